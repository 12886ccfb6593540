"""Loads the frozen model and its processor: the bundled one, a local folder, or a hub name."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedvlm import processes
from fedvlm.errors import FedVLMError
from fedvlm.models.names import refuse_foreign_release, refuse_own_code
from fedvlm.models.processors import load_processor
from fedvlm.settings.sections import ModelConfig

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = {"tiny": ASSETS / "tiny"}
UNLOADABLE = (OSError, ValueError, ImportError, KeyError, RuntimeError)


@dataclass(frozen=True)
class Loaded:
    """A frozen model on its device, with its processor."""

    model: Any
    processor: Any
    device: torch.device
    name: str


def load_model(config: ModelConfig) -> Loaded:
    """Loads ``config.name`` with ``AutoModelForImageTextToText`` and its processor.

    Raises:
        FedVLMError: no such folder or hub model, the hub is out of reach, a model that needs code
            of its own or lacks weights, no such device, or a setting that cannot be had here.
    """
    device = pick_device(config.device)
    source, local = _found(config)
    quantized = quantization(config.quantization, device)
    from transformers import AutoModelForImageTextToText

    try:
        processor = load_processor(source, local)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            config=_architecture(source, local),
            dtype=getattr(torch, config.dtype),
            local_files_only=local,
            trust_remote_code=False,
            output_loading_info=True,
            **quantized,
        )
    except UNLOADABLE as error:
        raise FedVLMError(_why(config.name, local, error)) from error
    model, report = loaded
    _check_weights(config.name, model, report)
    model.requires_grad_(False)
    freeze_statistics(model)
    if quantized:
        from peft import prepare_model_for_kbit_training

        # All that stays unquantized, norms among it, computes in float32.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model.to(device)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return Loaded(model, processor, device, config.name)


def load_shapes(config: ModelConfig) -> Any:
    """The model on torch's ``meta`` device: its layers and their shapes, without any weight.

    Raises:
        FedVLMError: as :func:`load_model`, as far as ``config.json`` tells; where the hub did not
            give that, caused by an ``OSError``.
    """
    device = pick_device(config.device)
    source, local = _found(config)
    quantization(config.quantization, device)
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                _architecture(source, local),
                dtype=getattr(torch, config.dtype),
                trust_remote_code=False,
            )
    except UNLOADABLE as error:
        raise FedVLMError(_why(config.name, local, error)) from error
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model.requires_grad_(False)


def _found(config: ModelConfig) -> tuple[str, bool]:
    """As :func:`locate`, ready to be read."""
    source, local = locate(config.name)
    if local:
        refuse_own_code(source)
    quiet_transformers()
    return source, local


def _architecture(source: str, local: bool) -> Any:
    from transformers import AutoConfig

    architecture = AutoConfig.from_pretrained(
        source, local_files_only=local, trust_remote_code=False
    )
    without_dropout(architecture)
    return architecture


def set_threads(model: Any, threads: int | None) -> None:
    """Sets torch's threads; None is 1 for a model under 10 M parameters, and else all cores.

    A small model gains little from threads, and loses ten-fold where cores are busy already. The
    processes of a run on one machine share its cores.
    """
    _, sharing = processes.local()
    if threads or sum(p.numel() for p in model.parameters()) < 10_000_000:
        torch.set_num_threads(threads or 1)
    elif sharing > 1:
        torch.set_num_threads(max(1, processes.cores() // sharing))


def without_dropout(architecture: Any) -> None:
    """Takes dropout and stochastic depth out of a model's configuration, in place.

    The base is frozen: noise in it would only disturb what the adapter learns, DPO's reference
    among it. ``lora.dropout`` is the adapter's own.
    """
    from transformers import PreTrainedConfig

    for name, value in vars(architecture).items():
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(architecture, name, 0.0)


def freeze_statistics(model: nn.Module) -> None:
    """Has batch norms use their stored statistics also while the adapter is trained, in place.

    Those of a batch would make a row's features depend on the rows beside it, and be learnt by the
    frozen base.
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
            layer.train = MethodType(lambda self, mode=True: self, layer)  # type: ignore[method-assign]


def quantization(kind: str, device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` is told for frozen weights of 8 or 4 bits; nothing for ``none``.

    Raises:
        FedVLMError: bitsandbytes is not installed, or cannot use the device.
    """
    if kind == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FedVLMError(
            f"model.quantization: '{kind}' needs bitsandbytes, which is not installed: "
            "pip install 'fedvlm[quant]'"
        )
    if device.type not in ("cuda", "cpu"):
        raise FedVLMError(
            f"model.quantization: '{kind}' needs a CUDA device (or the CPU), and this run is on "
            f"'{device}'; use model.quantization=none"
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells every cast
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return {"quantization_config": settings, "device_map": {"": device}}


def checkpoint_activations(model: Any) -> None:
    """Has a model recompute its activations in the backward pass, while it is in training mode.

    Raises:
        FedVLMError: the model's class does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise FedVLMError(
            f"model.gradient_checkpointing: {type(model).__name__} does not support it; "
            "use model.gradient_checkpointing=false and a smaller train.batch_size"
        )
    # transformers and PEFT call this so that inputs carry gradients, which only re-entrant
    # checkpointing needs; in GIT, which adds to its embeddings in place, it is an error.
    model.enable_input_require_grads = _nothing
    for part in (model.config, model.config.get_text_config(decoder=True)):
        if getattr(part, "use_cache", False):
            part.use_cache = False  # in training; generation has a setting of its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that 5.20 knows as well
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _nothing() -> None:
    return None


def _check_weights(name: str, model: Any, report: dict[str, Any]) -> None:
    """Refuses a model of which the checkpoint lacks weights: they would be random."""
    lacking = set(report["missing_keys"])
    weights = dict(model.named_parameters(remove_duplicate=False))
    loaded = {w.data_ptr() for n, w in weights.items() if n not in lacking}
    missing = sorted(n for n in lacking & set(weights) if weights[n].data_ptr() not in loaded)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FedVLMError(
            f"model.name: '{name}' lacks {len(missing)} weights of {type(model).__name__} "
            f"({', '.join(missing[:3])}{more}), which would be random; it must hold the weights "
            "in transformers' own format"
        )
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        logging.getLogger("fedvlm").warning(
            "%s: %d weights are not used by %s (%s, ...)",
            name, len(unexpected), type(model).__name__, ", ".join(unexpected[:3]),
        )  # fmt: skip


def locate(name: str) -> tuple[str, bool]:
    """Where a model's files are: (folder or hub name, whether it is local)."""
    if name in BUNDLED:
        return str(BUNDLED[name]), True
    if Path(name).is_dir():
        return name, True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise FedVLMError(
            f"model.name: there is no model folder '{name}'; give a folder with config.json and "
            "weights, a hub name such as HuggingFaceTB/SmolVLM-256M-Instruct, or 'tiny'"
        )
    refuse_foreign_release(name)
    return name, False


def identity(config: ModelConfig) -> str:
    """What decides the frozen model: its settings and, of a local one, its files as they are."""
    source, local = locate(config.name)
    files = sorted(Path(source).iterdir()) if local else []
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return f"{config.model_dump_json()} {source} {stats}"


def pick_device(name: str) -> torch.device:
    """``auto`` is this process's GPU, else the CPU.

    Of several processes on a machine, each has a GPU of its own, or shares one where they are more.

    Raises:
        FedVLMError: the device does not exist here.
    """
    number, sharing = processes.local()
    if name in ("auto", "cuda") and sharing > 1 and torch.cuda.is_available():
        device = torch.device("cuda", number % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FedVLMError(
            f"model.device: '{name}' cannot be used here ({reason}); use auto or cpu"
        ) from None
    return device


def quiet_transformers() -> None:
    """No progress bars, no advice about optional packages: what matters, we say ourselves."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers")


def _why(name: str, local: bool, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
    if "trust_remote_code" in str(error):
        reason = "it is read by code of its own, which fedvlm does not run"
    if local:
        return (
            f"model.name: the folder '{name}' does not load as a vision-language model: {reason}; "
            "it must hold what save_pretrained of the model and of its processor wrote"
        )
    return (
        f"model.name: '{name}' is neither a local folder nor a model that the Hugging Face hub "
        f"gave us: {reason}\n    Without a connection, download it elsewhere (hf download {name} "
        "--local-dir DIR), copy the folder, and set model.name=DIR; or use the bundled 'tiny'"
    )

"""Loads the frozen model and its processor: the bundled model, a local folder, or a hub name."""

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

from fedvlm import hub, processes
from fedvlm.errors import FedVLMError, brief
from fedvlm.models.folder import ADAPTER, check_folder, check_size, mark, refuse_adapter, refused
from fedvlm.models.names import HANDED, refuse_foreign_release, refuse_handed, refuse_own_code
from fedvlm.models.pin import still_allowed
from fedvlm.models.processors import load_processor, read_json
from fedvlm.models.spread import arranged, placement
from fedvlm.models.weights import check_weights
from fedvlm.settings.sections import ModelConfig

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = {"tiny": ASSETS / "tiny"}


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
        FedVLMError: the folder, hub model or device does not exist, the hub cannot be reached, the
            model needs custom code or lacks weights, or a setting is not available here.
    """
    if not config.shard:
        return _loaded(config)
    if processes.size() == 1:
        logging.getLogger("fedvlm").warning(
            "model.shard: there is one process, which holds the whole base; torchrun starts several"
        )
        return _loaded(config)
    from fedvlm.models.shards import in_turn, sharded

    with in_turn(pick_device(config.device)) as groups:
        loaded = _loaded(config, apart=False)
        sharded(loaded.model, loaded.device, groups)
    return loaded


def _loaded(config: ModelConfig, apart: bool = True) -> Loaded:
    """The model, on its device; on the CPU, if processes are to share its weights."""
    device = pick_device(config.device)
    source, local = _found(config, weights=True)
    quantized, spread = quantization(config.quantization, device), placement(config)
    from transformers import AutoModelForImageTextToText

    with hub.asked(source, local=local) as refusal:
        try:
            architecture = _architecture(source, local)
            where, options = hub.place(source, local)
            if local:
                with torch.device("meta"):
                    empty = AutoModelForImageTextToText.from_config(
                        architecture, trust_remote_code=False
                    )
                check_size(source, sum(p.numel() for p in empty.parameters()))
            processor = load_processor(source, local)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                where,
                config=architecture,
                dtype=getattr(torch, config.dtype),
                trust_remote_code=False,
                output_loading_info=True,
                **options,
                **quantized,
                **spread,
            )
        except FedVLMError:
            raise
        except Exception as error:  # damaged files end in errors of any kind
            raise _why(config.name, local, error, refusal) from error
    model, report = loaded
    still_allowed(source)
    check_weights(config.name, model, report)
    model.requires_grad_(False)
    freeze_statistics(model)
    if quantized:
        from peft import prepare_model_for_kbit_training

        # Modules that stay unquantized, such as norms, compute in float32.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    elif spread:
        device = arranged(model, config)
    elif apart:
        model.to(device)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return Loaded(model, processor, device, config.name)


def load_shapes(config: ModelConfig) -> Any:
    """The model on torch's ``meta`` device: its layers and their shapes, without weights.

    Raises:
        FedVLMError: as :func:`load_model`, as far as ``config.json`` shows. Its cause is an
            ``OSError`` if the hub did not provide that file.
    """
    device = pick_device(config.device)
    source, local = _found(config, weights=False)
    quantization(config.quantization, device)
    placement(config)
    from transformers import AutoModelForImageTextToText

    with hub.asked(source, local=local) as refusal:
        try:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(
                    _architecture(source, local),
                    dtype=getattr(torch, config.dtype),
                    trust_remote_code=False,
                )
        except FedVLMError:
            raise
        except Exception as error:  # damaged files end in errors of any kind
            raise _why(config.name, local, error, refusal) from error
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model.requires_grad_(False)


def _found(config: ModelConfig, weights: bool) -> tuple[str, bool]:
    """As :func:`locate`; refuses what the files alone show, and quiets transformers."""
    source, local = locate(config.name)
    if local:
        check_folder(source, weights=weights)
        refuse_own_code(source)
    quiet_transformers()
    processes.imported("peft")  # with the parts of torch and transformers that it needs
    return source, local


def _architecture(source: str, local: bool) -> Any:
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    if not local:
        refuse_adapter(source, read_json(source, ADAPTER, local))
    where, options = hub.place(source, local)
    architecture = AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    if type(architecture) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"it holds a '{brief(architecture.model_type)}' model, which does not write texts "
            "about images"
        )
    _refuse_kernels(architecture)
    without_dropout(architecture)
    return architecture


def _refuse_kernels(architecture: Any) -> None:
    """Refuses an attention whose code would come from the hub, such as ``org/kernel``."""
    for part in (architecture, *architecture.sub_configs):
        part = getattr(architecture, part, None) if isinstance(part, str) else part
        name = getattr(part, "_attn_implementation", None)
        if isinstance(name, str) and "/" in name:
            raise ValueError(
                f"its attention '{brief(name)}' is custom code from the hub, which fedvlm does not "
                "run"
            )


def set_threads(model: Any, threads: int | None) -> None:
    """Sets torch's threads; None means 1 for a model under 10 M parameters, else all cores.

    A small model gains little from threads, and is ten times slower if the cores are already busy.
    The processes of a run on one machine share its cores.
    """
    _, sharing = processes.local()
    if threads or sum(p.numel() for p in model.parameters()) < 10_000_000:
        torch.set_num_threads(threads or 1)
    elif sharing > 1:
        torch.set_num_threads(max(1, processes.cores() // sharing))


def without_dropout(architecture: Any) -> None:
    """Removes dropout and stochastic depth from a model's configuration, in place.

    The base is frozen. Noise in the base would only disturb the adapter's training and the
    reference of DPO. The adapter has its own dropout, ``lora.dropout``.
    """
    from transformers import PreTrainedConfig

    for name, value in vars(architecture).items():
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(architecture, name, 0.0)


def freeze_statistics(model: nn.Module) -> None:
    """Makes batch norms use their stored statistics during training too, in place.

    With batch statistics, a row's features would depend on the other rows of its batch, and the
    frozen base would update its statistics.
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
            layer.train = MethodType(lambda self, mode=True: self, layer)  # type: ignore[method-assign]


def quantization(kind: str, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for frozen weights of 8 or 4 bits; empty for ``none``.

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
            f"model.quantization: '{kind}' needs a CUDA device or the CPU, but this run is on "
            f"'{device}'; use model.quantization=none"
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs every cast
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
    """Makes a model in training mode recompute its activations in the backward pass.

    Raises:
        FedVLMError: the model's class does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise FedVLMError(
            f"model.gradient_checkpointing: {type(model).__name__} does not support it; "
            "use model.gradient_checkpointing=false and a smaller train.batch_size"
        )
    # transformers and PEFT call this method so that inputs carry gradients. Only re-entrant
    # checkpointing needs that. GIT adds to its embeddings in place, so the call fails there.
    model.enable_input_require_grads = _nothing
    for part in (model.config, model.config.get_text_config(decoder=True)):
        if getattr(part, "use_cache", False):
            part.use_cache = False  # for training; generation has its own setting
    with warnings.catch_warnings():
        # Newer transformers deprecate this name; transformers 5.20 has no other.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _nothing() -> None:
    return None


def locate(name: str) -> tuple[str, bool]:
    """Locates a model's files: (folder or hub name with its revision, whether it is local)."""
    refuse_handed(name)
    if name in BUNDLED:
        return str(BUNDLED[name]), True
    if os.path.isdir(name):
        return name, True
    if not hub.is_name(name, organized=False) or os.path.exists(name):
        why = " (it is a file)" if os.path.isfile(name) else ""
        why = " (write the path in full, without ~)" if name.startswith("~") else why
        raise FedVLMError(
            f"model.name: there is no model folder '{brief(name)}'{why}; give a folder with "
            "config.json and "
            "weights, a hub name such as HuggingFaceTB/SmolVLM-256M-Instruct (with @REVISION, if "
            "it is to stay the same), or 'tiny'"
        )
    refuse_foreign_release(hub.split(name)[0])
    return name, False


def mark_of(config: ModelConfig) -> str:
    """A digest that differs for another base model, wherever its files lie."""
    from transformers.utils import cached_file

    if config.name.startswith(HANDED):
        return config.name.removeprefix(HANDED)
    source, local = locate(config.name)
    if local:
        return mark(source)
    where, options = hub.place(source, local)
    options["local_files_only"] = True
    return mark(Path(str(cached_file(where, "config.json", **options))).parent)


def identity(config: ModelConfig) -> str:
    """Identifies the frozen model: its settings and, if local, files with sizes and times."""
    if config.name.startswith(HANDED):
        return config.model_dump_json()
    source, local = locate(config.name)
    files = sorted(Path(source).iterdir()) if local else []
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return f"{config.model_dump_json()} {source} {stats}"


def pick_device(name: str) -> torch.device:
    """The device by name; ``auto`` is this process's GPU, else the CPU.

    Several processes on a machine get a GPU each. If there are more processes than GPUs, they share
    the GPUs.

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
    """Turns off transformers' progress bars and its advice about optional packages."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for name in ("transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers")


def _why(name: str, local: bool, error: Exception, refusal: Exception | None) -> FedVLMError:
    if not local and (reason := hub.why_not(error, name, refusal=refusal)):
        return hub.Undelivered(hub.undelivered("model.name", name, reason))
    reason = brief(" ".join(str(error).split()) or repr(error))
    if not isinstance(error, OSError | ValueError | RuntimeError | ImportError):
        reason = brief(f"{type(error).__name__}: {reason}")  # a bare name, such as a missing key
    if "ignore_mismatched_sizes" in str(error):
        reason = "its weights have other shapes than its config.json asks for"
    if "trust_remote_code" in str(error):
        reason = "it needs custom code, which fedvlm does not run"
    if local:
        return refused(name, reason)
    return FedVLMError(hub.undelivered("model.name", name, reason))

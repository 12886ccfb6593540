"""A model and its processor that a program hands over, as the frozen base of a run.

The run works on a copy of the model's modules, which shares the memory of the weights. The
program's own model stays as it is: LoRA is attached to the copy, and nothing writes frozen weights.

A folder or hub model that was loaded and not changed keeps its name. Any other model gets the name
``handed:DIGEST``, and the weights are not written to the run's folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fedvlm.errors import FedVLMError, brief
from fedvlm.models.load import (
    BUNDLED,
    Loaded,
    checkpoint_activations,
    freeze_statistics,
    load_model,
    pick_device,
    quiet_transformers,
    without_dropout,
)
from fedvlm.models.names import HANDED
from fedvlm.models.processors import choose_template
from fedvlm.settings.sections import ModelConfig

logger = logging.getLogger("fedvlm")

Pair = tuple[Any, Any]
"""A model of transformers, and its processor."""
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_DTYPES[torch.float64] = "float64"


def checked(given: Any) -> Pair:
    """The model and its processor.

    Raises:
        FedVLMError: it is no such pair, or a model that no run can use.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel

    if not isinstance(given, tuple | list) or len(given) != 2:
        raise FedVLMError(f"model: it is a pair (model, processor), got {brief(type(given))}")
    model, processor = given
    if hasattr(model, "peft_config"):
        raise FedVLMError(
            f"model: {type(model).__name__} has an adapter; merge it first "
            "(model = model.merge_and_unload())"
        )
    if not isinstance(model, PreTrainedModel):
        raise FedVLMError(f"model: it must be a model of transformers, got {brief(type(model))}")
    if type(model.config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise FedVLMError(
            f"model: {type(model).__name__} does not write texts about images; load it with "
            "AutoModelForImageTextToText"
        )
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise FedVLMError(
                f"model: the processor {type(processor).__name__} has no {part}; load it with "
                "AutoProcessor"
            )
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if getattr(model, "is_quantized", False) or not kinds <= _DTYPES.keys() or len(kinds) != 1:
        raise FedVLMError(
            "model: its weights must have one type, float32, bfloat16, float16 or float64, and no "
            "quantization; a quantized model is loaded by model.name and model.quantization"
        )
    if any(p.is_meta for p in model.parameters()):
        raise FedVLMError("model: some of its weights are not in memory (device 'meta')")
    return model, processor


def named(given: Pair) -> dict[str, str]:
    """The name of a model and the type of its weights, as settings of the section ``model``."""
    dtype = _DTYPES[next(p.dtype for p in given[0].parameters() if p.is_floating_point())]
    place = str(getattr(given[0], "name_or_path", "") or "")
    name = next((known for known, path in BUNDLED.items() if str(path) == place), place)
    name = os.path.abspath(name) if name not in BUNDLED and os.path.isdir(name) else name
    mine = digest(*given)
    if name and _loads(ModelConfig(name=name, dtype=cast(Any, dtype), device="cpu"), mine):
        return {"name": name, "dtype": dtype}
    return {"name": f"{HANDED}{mine}", "dtype": dtype}


def _loads(config: ModelConfig, wanted: str) -> bool:
    """Whether a name loads as the model with this digest."""
    try:
        loaded = load_model(config)
        return digest(loaded.model, loaded.processor) == wanted
    except Exception as error:  # the folder is gone, or holds another model
        logger.info("the model is not what '%s' holds: %s", brief(config.name), brief(error))
        return False


def digest(model: Any, processor: Any) -> str:
    """A digest of a model's weights, its architecture, and its processor."""
    found = hashlib.blake2b(digest_size=16)
    about = copy.deepcopy(model.config)
    without_dropout(about)  # a run removes it
    texts = [about.to_dict(), getattr(model.generation_config, "to_dict", dict)()]
    for known in texts:
        for place in ("_name_or_path", "transformers_version"):
            known.pop(place, None)
        found.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(memoryview(cast(Any, content.numpy())))
    with tempfile.TemporaryDirectory() as folder:
        _prepared(processor, "").save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _prepared(processor: Any, source: str) -> Any:
    """A copy of a processor, with its tokenizer's chat template where it has none."""
    mine = copy.deepcopy(processor)
    level = logging.getLogger("fedvlm").level
    logging.getLogger("fedvlm").setLevel(logging.ERROR)
    try:
        choose_template(mine, source)
    finally:
        logging.getLogger("fedvlm").setLevel(level)
    return mine


def base(given: Pair, config: ModelConfig) -> Loaded:
    """The model as a frozen base, without a change to the program's own objects."""
    quiet_transformers()
    device = pick_device(config.device)
    model = shared(given[0])
    without_dropout(model.config)
    for layer in model.modules():
        for name, value in vars(layer).items():
            if "drop" in name and isinstance(value, float):
                setattr(layer, name, 0.0)
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    model.name_or_path = model.config._name_or_path = config.name
    model.eval()
    freeze_statistics(model)
    model.to(device)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return Loaded(model, _prepared(given[1], config.name), device, config.name)


def shared(model: Any) -> Any:
    """A copy of a model's modules on the memory of the same weights; its buffers are copied."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)

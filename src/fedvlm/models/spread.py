"""A frozen model over several devices of one process, by accelerate: ``model.device_map``.

Layers lie on different GPUs, or beside the GPU in the machine's memory or on its disk. accelerate's
hooks move the inputs of a layer to the layer's device, and bring weights from memory or disk for
the time of a forward pass. LoRA factors lie where their layer computes.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedvlm.errors import FedVLMError, brief
from fedvlm.settings.sections import ModelConfig

SHARE = 0.6  # of a GPU's memory for frozen weights; a pass of clients needs the rest

logger = logging.getLogger("fedvlm")


def placement(config: ModelConfig) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a model on several devices; empty for one device.

    Raises:
        FedVLMError: there is no such GPU here.
    """
    if config.device_map == "none":
        return {}
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    folder = tempfile.TemporaryDirectory(prefix="fedvlm-")  # removed with the model
    found: dict[str, Any] = {"offload_folder": _Folder(folder)}
    if isinstance(config.device_map, dict):
        odd = [p for p in config.device_map.values() if isinstance(p, int) and p not in gpus]
        if odd:
            raise FedVLMError(
                f"model.device_map: there is no GPU {odd[0]} here, but {len(gpus)} GPUs"
            )
        return {**found, "device_map": dict(config.device_map)}
    if not gpus:
        logger.warning("model.device_map=auto: there is no GPU here; the model is on the CPU")
        return {"device_map": {"": "cpu"}}
    share = {gpu: most_of(config, gpu) for gpu in gpus}
    return {**found, "device_map": "auto", "max_memory": {**share, "cpu": _free()}}


def most_of(config: ModelConfig, gpu: int) -> int:
    """The most bytes of frozen weights on a GPU, with ``device_map=auto``."""
    if config.device_memory is not None:
        return config.device_memory * 2**20
    return int(SHARE * torch.cuda.get_device_properties(gpu).total_memory)


class _Folder(str):
    """The path of a temporary folder, which is removed with this object."""

    def __new__(cls, folder: tempfile.TemporaryDirectory[str]) -> _Folder:
        made = super().__new__(cls, Path(folder.name) / "weights")
        made.folder = folder
        return made

    folder: tempfile.TemporaryDirectory[str]


def _free() -> int:
    """Bytes of the machine's memory for weights."""
    import psutil

    return int(0.8 * psutil.virtual_memory().available)


def arranged(model: Any, config: ModelConfig) -> torch.device:
    """The device of a spread model's inputs: the first that is not only a store of weights.

    Raises:
        FedVLMError: ``model.device_map`` names other modules than the model has.
    """
    if isinstance(config.device_map, dict):
        _check_names(model, config.device_map)
    places = list(getattr(model, "hf_device_map", {"": "cpu"}).values())
    devices = [p for p in places if p not in ("cpu", "disk")]
    if "disk" in places or (devices and "cpu" in places):
        _tell(model, config)
    first = devices[0] if devices else "cpu"
    return torch.device("cuda", first) if isinstance(first, int) else torch.device(first)


def _check_names(model: nn.Module, places: Mapping[str, int | str]) -> None:
    known = {name for name, _ in model.named_modules()}
    if odd := [name for name in places if name not in known]:
        raise FedVLMError(
            f"model.device_map: '{brief(odd[0])}' is no module of {type(model).__name__}; its "
            f"parts are {', '.join(name for name, _ in model.named_children())}"
        )
    heads = tuple(f"{name}." if name else "" for name in places)
    left = [name for name, _ in model.named_parameters() if not name.startswith(heads)]
    if left:
        raise FedVLMError(
            f"model.device_map: {len(left)} weights have no place, such as '{brief(left[0])}'; a "
            "mapping covers all modules, and '' stands for the whole model"
        )


def _tell(model: nn.Module, config: ModelConfig) -> None:
    """Warns about weights that a forward pass must fetch."""
    weights = [p for p in model.parameters() if p.is_meta]
    size = sum(p.numel() * p.element_size() for p in weights)
    wait = (
        ""
        if config.gradient_checkpointing
        else (
            ", and training keeps them there until its backward pass; "
            "model.gradient_checkpointing=true lets them go layer by layer"
        )
    )
    logger.warning(
        "model.device_map: %.1f MB of weights lie in memory or on disk; every pass brings them to "
        "the device%s",
        size / 1e6,
        wait,
    )


def place_of(layer: nn.Module, otherwise: torch.device) -> torch.device:
    """The device on which a layer computes.

    Args:
        layer: a layer with a ``weight``.
        otherwise: the device of a layer whose weight has no values.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if weight.device.type != "meta":
        return weight.device
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return otherwise if device is None else torch.device(device)


def hooked(layer: nn.Module) -> bool:
    """Whether accelerate moves the inputs or the weights of a layer, in calls of the layer only."""
    return hasattr(layer, "_hf_hook")


def held(model: nn.Module) -> dict[torch.device, int]:
    """Bytes of a model's parameters by device.

    Weights in a store do not count, and of sharded weights only the share of this process.
    """
    found: dict[torch.device, int] = {}
    for p in map(local, model.parameters()):
        if p.device.type != "meta":
            found[p.device] = found.get(p.device, 0) + p.numel() * p.element_size()
    return found


def local(weight: Any) -> Tensor:
    """The share of a weight in this process, which usually is all of it."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


@contextlib.contextmanager
def standing_in(model: nn.Module) -> Iterator[None]:
    """Gives stored weights a device and a shape within this context, without their memory.

    PEFT puts new factors where the weight of their layer is. A stored weight is nowhere.
    """
    stored: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False):
            for name, p in list(module.named_parameters(recurse=False)):
                stored.append((module, name, p))
                device = place_of(module, torch.device("cpu"))
                full = torch.zeros((), dtype=p.dtype, device=device).expand(p.shape)
                module._parameters[name] = nn.Parameter(full, requires_grad=False)
    try:
        yield
    finally:
        for module, name, p in stored:
            module._parameters[name] = p


def settle(model: Any) -> None:
    """Ends a part of a run in this process; see :class:`fedvlm.models.shards.Lockstep`.

    It does nothing for a model that is whole in every process.
    """
    lockstep = getattr(model, "lockstep", None)
    if lockstep is not None:
        lockstep.settle()

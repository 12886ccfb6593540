"""LoRA on a frozen model by PEFT: the choice of layers, and the adapter as a tree."""

from __future__ import annotations

import copy
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedvlm.errors import FedVLMError
from fedvlm.layers import part, searcher
from fedvlm.models.spread import standing_in
from fedvlm.seeds import derive
from fedvlm.settings.sections import LoraConfig
from fedvlm.store.files import save_stacked
from fedvlm.tree import Tree, module, pad

logger = logging.getLogger("fedvlm")

PRESETS = {
    "language": {"language"},
    "vision": {"vision"},
    "projector": {"projector"},
    "vision+language": {"vision", "language"},
    "all-linear": {"vision", "projector", "language"},
}


def attach(model: nn.Module, config: LoraConfig, seed: int) -> Any:
    """Wraps ``model`` with LoRA; the same seed gives the same initial A on any machine.

    Returns:
        The ``peft.PeftModel``, with factors in fp32 and B zero.

    Raises:
        FedVLMError: no module matches, or the rank is larger than an adapted layer.
    """
    modules = targets(model, config.target)
    _check_rank(model, modules, config.rank)
    return _attach(model, config, seed, modules)


def drop_dead(model: Any, config: LoraConfig, seed: int, loss: Callable[[Any], Tensor]) -> Any:
    """Removes LoRA from the layers that get no gradient, and logs their names.

    In some families the loss does not depend on every layer: LLaVA reads the last but one layer of
    its vision tower, and SigLIP's pooling head is unused. Factors of such layers would be sent but
    would never change.

    Args:
        model: the result of :func:`attach`. Do not use it afterwards.
        config: as for :func:`attach`.
        seed: as for :func:`attach`.
        loss: computes the model's loss on some batch.

    Returns:
        The model with LoRA on the layers that learn; ``model`` itself if all layers learn.

    Raises:
        FedVLMError: no layer gets a gradient.
    """
    params = handles(model)
    with torch.random.fork_rng():
        loss(model.train()).backward()
    dead = sorted({module(name) for name, p in params.items() if p.grad is None})
    model.zero_grad()
    if not dead:
        return model
    adapted = {module(name) for name in params}
    kinds = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in dead}))
    if len(dead) == len(adapted):
        raise FedVLMError(
            f"lora.target: '{config.target}' selects {len(dead)} layers, but the loss depends on "
            f"none of them: {kinds}; choose other layers"
        )
    logger.warning(
        "%d of %d adapted layers get no gradient; LoRA is removed from them: %s",
        len(dead),
        len(adapted),
        kinds,
    )
    return _attach(model.unload(), config, seed, sorted(adapted - set(dead)))


def _attach(model: nn.Module, config: LoraConfig, seed: int, modules: list[str]) -> Any:
    """Attaches LoRA. Spare ranks are zero, so they do not change the adapter's output."""
    adapted = _attach_ranks(model, config, seed, modules, config.rank)
    if not config.spare:
        return adapted
    initial = read(handles(adapted))
    wide = config.rank + config.spare
    adapted = _attach_ranks(adapted.unload(), config, seed, modules, wide)
    write(handles(adapted), pad(initial, 0, config.spare))
    return adapted


def _attach_ranks(
    model: nn.Module, config: LoraConfig, seed: int, modules: list[str], ranks: int
) -> Any:
    import peft

    more = ranks / config.rank  # keeps the scaling of lora.rank
    lora = peft.LoraConfig(
        r=ranks,
        lora_alpha=config.alpha * (more**0.5 if config.rslora else more),  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=modules,
    )
    with torch.random.fork_rng(), standing_in(model):
        torch.manual_seed(derive(seed, "adapter"))
        return peft.get_peft_model(model, lora)


def targets(model: nn.Module, target: str) -> list[str]:
    """The names of the linear layers that a preset or a regular expression selects.

    Raises:
        FedVLMError: no layer matches; the message lists the model's layers.
    """
    linear = _linear_layers(model)
    if target in PRESETS:
        found = [n for n in linear if part(n) in PRESETS[target]]
    else:
        try:
            fits = searcher(target, longest=None)  # a setting was checked
        except ValueError as error:
            presets = ", ".join(PRESETS)
            raise FedVLMError(f"lora.target: {error}; it is none of {presets} either") from None
        found = [n for n in linear if fits(n)]
    if not found:
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", n) for n in linear})
        raise FedVLMError(
            f"lora.target: '{target}' matches none of the model's {len(linear)} linear layers; use "
            f"a preset ({', '.join(PRESETS)}) or a regular expression for these layers:\n    "
            + "\n    ".join(kinds)
        )
    return found


def handles(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters under PEFT's saved names, in a fixed order."""
    return {
        name.replace(".default.", "."): p
        for name, p in sorted(model.named_parameters())
        if ".lora_A." in name or ".lora_B." in name
    }


def read(params: Mapping[str, nn.Parameter]) -> Tree:
    """A copy of the adapter, on the CPU."""
    return {n: p.detach().to("cpu", copy=True) for n, p in params.items()}


@torch.no_grad()
def write(params: Mapping[str, nn.Parameter], tree: Mapping[str, Tensor]) -> None:
    """Copies an adapter into the model.

    Raises:
        KeyError: ``tree`` lacks a factor of the model.
    """
    for name, p in params.items():
        p.copy_(tree[name])


def save_adapter(model: Any, tree: Tree, folder: Path) -> None:
    """Writes a folder that ``PeftModel.from_pretrained`` loads, whole or not at all."""
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
    scratch.mkdir(parents=True)
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set's order differs by process
    try:
        config.save_pretrained(str(scratch))
        save_stacked(scratch / "adapter_model.safetensors", tree, {"format": "pt"})
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # half written


def _linear_layers(model: Any) -> list[str]:
    """All linear layers except the output embedding, which is often tied to the input embedding."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def _check_rank(model: nn.Module, modules: Iterable[str], rank: int) -> None:
    layers: dict[str, Any] = {n: model.get_submodule(n) for n in modules}
    shapes = {n: (m.out_features, m.in_features) for n, m in layers.items()}
    name = min(shapes, key=lambda n: min(shapes[n]))
    (out, into), smallest = shapes[name], min(shapes[name])
    if rank > smallest:
        raise FedVLMError(
            f"lora.rank: {rank} is larger than the adapted layer {name} ({into} -> {out}); "
            f"use at most {smallest}, or leave that layer out with lora.target"
        )

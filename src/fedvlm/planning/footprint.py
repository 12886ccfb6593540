"""What a model and its adapters take, by their shapes alone: parameters, memory, messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedvlm.algorithms.table import Algorithm, Client, State, build, check_share
from fedvlm.engines.wire import sent_up
from fedvlm.settings.sections import Config
from fedvlm.tree import Tree, nbytes, pad, saved_bytes

if TYPE_CHECKING:
    import torch

PACKED = {"none": None, "8bit": 1.0, "4bit": 0.5}
"""Bytes of a quantized weight, its scales left out."""


@dataclass(frozen=True)
class Footprint:
    """The model and its adapter.

    Attributes:
        parameters: of the frozen model.
        weights: bytes of these on the device.
        trained: elements of the adapter that a client of the largest rank trains.
        engine: the engine that can train this model.
        room: bytes that a pass of clients may add to the model.
        most: clients that fit into a pass if batches took no room; an upper bound.
        each: bytes of a client in a pass, its batch left out.
    """

    parameters: int
    weights: int
    trained: int
    engine: str
    room: int
    most: int
    each: int


def shapes(model: Any, config: Config) -> Tree:
    """A client's adapter, without values, from a model on the ``meta`` device with LoRA attached.

    Raises:
        ConfigError: the algorithm's share map does not fit it.
    """
    from fedvlm.models.lora import handles

    adapter = {name: p.detach() for name, p in handles(model).items()}
    check_share(config.algorithm, adapter)
    return pad(adapter, 0, config.adapter.spare or 0)


def measure(
    config: Config, model: Any, adapter: Tree, algorithms: Iterable[Algorithm]
) -> Footprint:
    """What a run's model and adapters take.

    Args:
        config: the run's settings.
        model: on the ``meta`` device, with LoRA attached.
        adapter: see :func:`shapes`.
        algorithms: of all rounds.
    """
    from fedvlm.engines.choice import engine_class, memory
    from fedvlm.engines.reference import ReferenceEngine
    from fedvlm.models.load import pick_device

    frozen = {n: p for n, p in model.named_parameters() if ".lora_" not in n}
    weights = _weight_bytes(model, frozen, PACKED[config.model.quantization])
    alone = engine_class(config.engine, model) is ReferenceEngine
    device = pick_device(config.model.device)
    room = memory.budget(config.engine.memory, device, weights)
    each = memory.COPIES * nbytes([adapter])
    most = config.engine.clients or memory.fitting(room, device, each)
    return Footprint(
        parameters=sum(p.numel() for p in frozen.values()),
        weights=weights,
        trained=_trained(adapter, algorithms),
        engine="reference" if alone else "cohort",
        room=room,
        most=1 if alone else most,
        each=each,
    )


def _weight_bytes(model: Any, frozen: Tree, packed: float | None) -> int:
    from torch import nn

    if packed is None:
        return nbytes([frozen])
    head = model.get_output_embeddings()  # stays as it is, as do norms, embeddings, convolutions
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    return int(sum(p.numel() * (packed if id(p) in linear else 4) for p in frozen.values()))


def _trained(adapter: Tree, algorithms: Iterable[Algorithm]) -> int:
    import torch

    masks: dict[str, torch.Tensor] = {}
    for phase in (phase for algorithm in algorithms for phase in algorithm.phases):
        for name in filter(phase.trains, adapter):
            like = torch.empty(adapter[name].shape)
            here = phase.mask(name, like) if phase.mask else torch.tensor(True)
            masks[name] = masks.get(name, torch.tensor(False)) | here
    return sum(int(mask.expand(adapter[n].shape).sum()) for n, mask in masks.items())


def messages(
    config: Config, adapter: Tree, visits: Iterable[tuple[Algorithm, str]]
) -> Iterator[tuple[int, int]]:
    """Of every client in every round: bytes up and down. They differ by algorithm and rank."""
    state = build(config.algorithm, config.lora).init(adapter)
    known: dict[tuple[int, str | None], tuple[int, int]] = {}
    for algorithm, name in visits:
        ranked = next((p for p in config.lora.ranks or {} if re.search(p, name)), None)
        key = id(algorithm), ranked
        if key not in known:
            known[key] = _messages(algorithm, adapter, state, Client(name, 1.0))
        yield known[key]


def _messages(algorithm: Algorithm, adapter: Tree, state: State, client: Client) -> tuple[int, int]:
    down = algorithm.download(state, client)
    return saved_bytes(sent_up(algorithm, adapter, down)), saved_bytes(down)

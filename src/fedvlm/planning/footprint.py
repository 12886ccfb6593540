"""Parameters, memory and messages of a model and its adapters, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedvlm.algorithms.base import Algorithm, State, Train, Visit
from fedvlm.algorithms.dry import rehearse
from fedvlm.algorithms.table import adapter_of, check_fit, find
from fedvlm.engines.compress import compression
from fedvlm.engines.stages import packed
from fedvlm.engines.summand import Summand
from fedvlm.layers import searcher
from fedvlm.settings.sections import Config
from fedvlm.tree import Tree, nbytes, pad, saved_bytes

if TYPE_CHECKING:
    import torch

PACKED = {"none": None, "8bit": 1.0, "4bit": 0.5}
"""Bytes of a quantized weight, without its scales."""


@dataclass(frozen=True)
class Footprint:
    """The size of the model and its adapter.

    Attributes:
        parameters: number of parameters of the frozen model.
        weights: bytes of these parameters on the device.
        trained: elements of the adapter that a client of the largest rank trains.
        engine: the engine that can train this model.
        room: bytes that a pass of clients may add to the model.
        most: upper bound of the clients in a pass, for batches without memory.
        each: bytes of a client in a pass, without its batch.
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
        ConfigError: the settings of the algorithm do not fit the adapter.
    """
    from fedvlm.models.lora import handles

    adapter = {name: p.detach() for name, p in handles(model).items()}
    check_fit(config.algorithm, adapter)
    return pad(adapter, 0, adapter_of(config).spare or 0)


def stand_in(config: Config) -> Tree:
    """An adapter of one layer without values, to count steps where the model is unknown."""
    import torch

    ranks = config.lora.rank + (adapter_of(config).spare or 0)
    name = "base_model.model.layer.lora_{}.weight"
    shapes = {"A": (ranks, config.lora.rank), "B": (config.lora.rank, ranks)}
    return {name.format(f): torch.empty(s, device="meta") for f, s in shapes.items()}


def measure(config: Config, model: Any, adapter: Tree, stretches: Iterable[Train]) -> Footprint:
    """The size of a run's model and adapters.

    Args:
        config: the settings of the run.
        model: the model on the ``meta`` device, with LoRA attached.
        adapter: see :func:`shapes`.
        stretches: the stretches of training of all rounds.
    """
    from fedvlm.engines import memory
    from fedvlm.engines.choice import engine_class
    from fedvlm.engines.reference import ReferenceEngine
    from fedvlm.models.load import pick_device

    frozen = {n: p for n, p in model.named_parameters() if ".lora_" not in n}
    weights = _weight_bytes(model, frozen, PACKED[config.model.quantization])
    alone = engine_class(config.engine, model) is ReferenceEngine
    device = pick_device(config.model.device)
    room = memory.room(config.engine.memory, _by_device(config, device, weights))
    each = memory.COPIES * nbytes([adapter])
    most = config.engine.clients or memory.fitting(room, device, each)
    return Footprint(
        parameters=sum(p.numel() for p in frozen.values()),
        weights=weights,
        trained=_trained(adapter, stretches),
        engine="reference" if alone else "cohort",
        room=room,
        most=1 if alone else most,
        each=each,
    )


def _by_device(config: Config, device: torch.device, weights: int) -> dict[torch.device, int]:
    """Bytes of the frozen weights by device.

    ``device_map=auto`` fills all GPUs evenly. ``shard`` is planned with a process for each GPU.
    """
    import torch

    from fedvlm.models.spread import most_of

    if device.type == "cuda" and config.model.shard:
        return {device: weights // torch.cuda.device_count()}
    if config.model.device_map == "none" or device.type != "cuda":
        return {device: weights}
    gpus = [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    return {gpu: min(weights // len(gpus), most_of(config.model, gpu.index)) for gpu in gpus}


def _weight_bytes(model: Any, frozen: Tree, packed: float | None) -> int:
    from torch import nn

    if packed is None:
        return nbytes([frozen])
    head = model.get_output_embeddings()  # not quantized, like norms, embeddings, convolutions
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    return int(sum(p.numel() * (packed if id(p) in linear else 4) for p in frozen.values()))


def _trained(adapter: Tree, stretches: Iterable[Train]) -> int:
    import torch

    masks: dict[str, torch.Tensor] = {}
    whole: set[tuple[str, ...]] = set()  # factors of stretches without a mask: most are alike
    for stretch in stretches:
        names = tuple(filter(stretch.trains, adapter))
        if stretch.mask is None:
            if names in whole:
                continue
            whole.add(names)
        for name in names:
            like = torch.empty(adapter[name].shape)
            here = stretch.mask(name, like) if stretch.mask else torch.tensor(True)
            masks[name] = masks.get(name, torch.tensor(False)) | here
    return sum(int(mask.expand(adapter[n].shape).sum()) for n, mask in masks.items())


@dataclass(frozen=True)
class Exchange:
    """A client's round, from shapes alone.

    Attributes:
        up: bytes of the client's message.
        down: bytes of its download.
        stretches: its requests for training.
    """

    up: int
    down: int
    stretches: tuple[Train, ...]


class Exchanges:
    """The exchanges of a run, by round and by rank.

    Args:
        config: the settings of the run.
        algorithm: the algorithm of the run.
        adapter: see :func:`shapes`.
        names: the clients of a round; the messages of a secure sum grow with them.
    """

    def __init__(
        self, config: Config, algorithm: Algorithm, adapter: Tree, names: Sequence[str] = ()
    ):
        self.algorithm, self.adapter = algorithm, adapter
        self._names = tuple(names) if config.wire.secure else ()
        pools = find(config.algorithm.name).pools
        self.stages = () if pools else compression(config.wire)
        self._ranks = {p: searcher(p) for p in config.lora.ranks or {}}
        self._state: State = algorithm.init(adapter)
        self._known: dict[tuple[Any, ...], Exchange] = {}

    def of(self, visit: Visit, steps: int) -> Exchange:
        """A client's exchange in a round with ``steps`` usual steps."""
        rank = next((p for p, fits in self._ranks.items() if fits(visit.client)), None)
        key = visit.round, visit.sampled, visit.final, rank, steps
        if key not in self._known:
            down = self.algorithm.send(self._state, visit)
            found = rehearse(self.algorithm, self.adapter, visit, down, steps)
            message, _ = packed(self.stages, found.sent.up, down, {}, visit)
            up = self._masked(visit, down) if self._names else saved_bytes(message)
            self._known[key] = Exchange(up, saved_bytes(down), found.stretches)
        return self._known[key]

    def _masked(self, visit: Visit, down: Tree) -> int:
        """Bytes of a client's messages in a secure sum."""
        from fedvlm.privacy.blind.encoding import HEAD
        from fedvlm.privacy.blind.messages import told_bytes

        size = HEAD + Summand(self.algorithm, self.adapter, visit, down).size
        return 4 * size + told_bytes(self._names[0], self._names)

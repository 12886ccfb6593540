"""Many clients' LoRA factors on one frozen base: one batch holds the batches of all clients.

Every LoRA layer reads stacked factors, ``A [clients, rank, in]`` and ``B [clients, rank, out]``,
which lie in a few tensors (:mod:`fedvlm.models.runs`). The base layer sees all rows at once; the
factors' products are batched over the clients (:mod:`fedvlm.models.adapted`). The
clients' mean losses are summed, so no gradient crosses clients. One backward pass and one
elementwise optimizer therefore train every client as if it were alone.

The rows of a batch lie in blocks of equal size, one block per client. A layer finds the blocks by
dividing its first axis. This works if every row contributes the same number of entries to that
axis: tokens, patches or windows. Other batches (pictures of different sizes in models that pack
patches) are trained one client at a time, see :meth:`Stack.batch`.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedvlm.models.adapted import Beside, Factors, OneAdapter, Thin, Whole
from fedvlm.models.blocks import Blocks
from fedvlm.models.runs import Runs
from fedvlm.models.spread import hooked, place_of
from fedvlm.tree import Select, Tree

THIN = 7.5  # time per operation of a rank-8 product over a wide product's, on 2 CPU cores
SHARED = 200_000  # multiplications of a rank-8 product in the time that a shared call saves


class StackedLora(nn.Module):
    """A frozen linear layer with LoRA factors of several clients."""

    def __init__(self, base_layer: nn.Module, scaling: float, dropout: nn.Module, stack: Stack):
        super().__init__()
        self.base_layer = base_layer
        self.scaling = scaling
        self.dropout = dropout
        self._disable_adapters = False
        self._stack = [stack]  # a list: the stack is no submodule
        plain = type(base_layer) is nn.Linear and isinstance(dropout, nn.Identity)
        self.plain = plain and not hooked(base_layer)
        self._base = [base_layer]  # the attribute of a module costs a call of Python
        self._shape = tuple(base_layer.weight.shape)  # type: ignore[operator, arg-type]
        self.factors: Factors
        self.beside: Neighbours | None = None
        self.shared: tuple[Tensor, Tensor]

    @property
    def weight(self) -> Tensor:
        """The frozen weight; some models read its type."""
        return self.base_layer.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:  # [blocks of rows..., in] -> [..., out]
        if self._disable_adapters:
            return self.base_layer(x)
        stack = self._stack[0]
        if stack.spreads:
            a, b = self.shared
            y, wide = self.base_layer(x), self.dropout(x.to(a.dtype))
            low = OneAdapter.apply(stack.blocks(wide), a, b, self.scaling)
            return (y + stack.unblocks(low, y.shape)).to(y.dtype)
        own = self.factors
        if self.plain and self._whole(x, stack.count):
            return Whole.apply(x, own, *self._base, *own.own(x))
        if self.plain and self.beside:
            return self.beside.output(self, x)
        if self.plain:
            return Thin.apply(x, own, self._base, *own.own(x))[0]
        y, wide = self.base_layer(x), self.dropout(x.to(own.dtype))
        return (y + Beside.apply(wide, own, y.shape[-1], *own.own(wide))).to(y.dtype)

    def _whole(self, x: Tensor, clients: int) -> bool:
        """Whether one whole weight per client is faster than two thin products."""
        if clients == 1 or x.device.type != "cpu":
            return False
        if x.dtype != self.factors.dtype or self._base[0].weight.dtype != x.dtype:
            return False
        shapes = self.beside.shapes if self.beside else (self._shape,)
        return whole(shapes, self.factors.rank, x.numel() // self._shape[1], clients)


@functools.lru_cache(1024)
def whole(shapes: tuple[tuple[int, int], ...], rank: int, entries: int, clients: int) -> bool:
    """Whether whole weights are faster than thin products, for layers that read one tensor.

    A product with the rank as one side runs at a fraction of the speed of a wide product. Small
    layers with many entries are therefore faster with ``W + B A``, despite more operations. Layers
    that read one tensor then lose what they share, which outweighs the products of small clients.

    Args:
        shapes: outputs and inputs of each layer.
        rank: of the factors.
        entries: of all clients.
        clients: in the pass.
    """
    gain = -float(SHARED * (len(shapes) - 1))
    for out, into in shapes:
        thin = 3 * rank * entries * (into + out)
        gain += thin - clients * 3 * rank * into * out - into * out * entries / THIN
    return gain > 0


class Neighbours:
    """Layers that read one tensor; the first call computes the outputs of all of them.

    Args:
        layers: the layers, all plain.
        factors: their factors, with the As in one piece.

    Attributes:
        shapes: outputs and inputs of each layer.
    """

    def __init__(self, layers: Sequence[StackedLora], factors: Factors):
        self._layers, self._factors = list(layers), factors
        self._bases = [layer.base_layer for layer in layers]
        self.shapes = tuple(layer._shape for layer in layers)
        self._of: tuple[Any, ...] = ()
        self._outputs: dict[int, Tensor] = {}

    def output(self, layer: StackedLora, x: Tensor) -> Tensor:
        """The output of a layer; kept for it if another layer has read the same tensor before."""
        now = x, x._version, torch.is_grad_enabled()
        known = self._of and self._of[0] is x and self._of[1:] == now[1:]
        if not known or id(layer) not in self._outputs:
            found = Thin.apply(x, self._factors, self._bases, *self._factors.own(x))
            self._of = now
            self._outputs = {id(own): y for own, y in zip(self._layers, found, strict=True)}
        y = self._outputs.pop(id(layer))
        if not self._outputs:
            self.forget()
        return y

    def forget(self) -> None:
        """Frees the outputs that nobody has taken."""
        self._of, self._outputs = (), {}


class Stack(Blocks):
    """A PEFT model whose LoRA layers have been replaced by stacked ones.

    Attributes:
        runs: the loaded adapters.
        shared: the factors of an adapter that all places share, see :meth:`spread`.
        spreads: whether they are in use.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.runs = Runs()
        self.shared: dict[str, nn.Parameter] = {}
        self.spreads = False
        self._beside: list[tuple[str, ...]] = []
        self.layers: dict[str, StackedLora] = {}
        for name, layer in list(model.named_modules()):
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
                of_layer = layer.scaling["default"], layer.lora_dropout["default"]
                stacked = StackedLora(layer.base_layer, *of_layer, self)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, stacked)
                self.layers[name] = stacked

    def load(
        self,
        trees: Sequence[Mapping[str, Tensor]],
        device: torch.device,
        trains: Select | None = None,
    ) -> None:
        """Loads the adapters of some clients, replacing the previous adapters.

        Args:
            trees: the adapter of each client.
            device: the device of the model. Where it is spread over several, a factor goes to the
                device of its layer.
            trains: selects the factors that get a gradient; None: those of before, or all.
        """
        self.spreads = False
        self.renew()
        blocks = [tuple(f"{name}.lora_A.weight" for name in group) for group in self._beside]
        if self.runs.load(trees, self.places(device), trains, blocks):
            self._place()

    def places(self, device: torch.device) -> dict[str, torch.device]:
        """The device of each factor, see :meth:`load`."""
        found = {name: place_of(layer.base_layer, device) for name, layer in self.layers.items()}
        return {f"{name}.lora_{f}.weight": found[name] for name in found for f in "AB"}

    def _place(self) -> None:
        for name, layer in self.layers.items():
            layer.factors, layer.beside = self._factors([name]), None
        for group in self._beside:
            factors, layers = self._factors(group), [self.layers[name] for name in group]
            if factors.in_one_piece:
                neighbours = Neighbours(layers, factors)
                for layer in layers:
                    layer.beside = neighbours

    def _factors(self, names: Sequence[str]) -> Factors:
        places = self.runs.places
        a, b = ([places[f"{name}.lora_{f}.weight"] for name in names] for f in "AB")
        return Factors(self, self.layers[names[0]].scaling, a, b)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Finds the layers that read one tensor, from a forward pass within this context."""
        groups: list[list[str]] = []
        last: list[Tensor] = []

        def note(name: str, args: tuple[Any, ...]) -> None:
            if last and args and last[0] is args[0]:
                groups[-1].append(name)
            else:
                groups.append([name])
            last[:] = args[:1]

        hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
            for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        of: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
        for group in groups:
            for name in group:
                of[name].add(tuple(group))
        self._beside = [
            group for group in dict.fromkeys(map(tuple, groups)) if self._fit(group, of)
        ]

    def _fit(self, group: tuple[str, ...], of: Mapping[str, Collection[Any]]) -> bool:
        """Whether layers that read one tensor can be computed together, each of them once."""
        layers = [self.layers[name] for name in group]
        alike = len({layer.scaling for layer in layers}) == 1 and all(o.plain for o in layers)
        return 1 < len(group) == len(set(group)) and alike and all(len(of[n]) == 1 for n in group)

    def spread(self, tree: Mapping[str, Tensor], places: int, trains: Select) -> None:
        """Loads one adapter for several places, without copies; each place has its own gradient.

        Args:
            tree: the adapter, each factor on the device of its layer.
            places: the number of places.
            trains: selects the factors that get a gradient.
        """
        self.spreads = True
        for name, tensor in tree.items():
            shared = tensor.detach().expand(places, *tensor.shape)
            self.shared[name] = nn.Parameter(shared, requires_grad=trains(name))
        for name, layer in self.layers.items():
            a, b = (self.shared[f"{name}.lora_{f}.weight"] for f in "AB")
            layer.shared = a, b

    @property
    def clients(self) -> int:
        """How many adapters are loaded, or how many places share one."""
        return len(next(iter(self.shared.values()))) if self.spreads else self.runs.clients

    def trees(self) -> list[Tree]:
        """Copies of the clients' adapters, on the CPU."""
        return self.runs.trees()

    def activate(self, clients: Sequence[int]) -> None:
        """Sets the clients of the next batches: in this order, with equally many rows each."""
        for layer in self.layers.values():
            if layer.beside:
                layer.beside.forget()
        self.choose(clients)

    def narrow(self, clients: Sequence[int], rows: int) -> None:
        """Sets the clients of the next batches, and their rows, whose layers all see rows."""
        self.activate(clients)
        self.batch(rows, 1, lambda: True)

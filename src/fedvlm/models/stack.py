"""Many clients' LoRA factors on one frozen base: one batch holds the batches of all clients.

Every LoRA layer holds stacked factors, ``A [clients, rank, in]`` and ``B [clients, out, rank]``.
The base layer sees all rows at once; the factors' products are batched over the clients. The
clients' mean losses are summed, so no gradient crosses clients. One backward pass and one
elementwise optimizer therefore train every client as if it were alone.

The rows of a batch lie in blocks of equal size, one block per client. A layer finds the blocks by
dividing its first axis. This works if every row contributes the same number of entries to that
axis: tokens, patches or windows. Other batches (pictures of different sizes in models that pack
patches) are trained one client at a time, see :meth:`Stack.batch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedvlm.models.spread import place_of
from fedvlm.tree import Select, Tree

THIN = 7.5  # time per operation of a rank-8 product over a wide product's, on 2 CPU cores


class StackedLora(nn.Module):
    """A frozen linear layer with LoRA factors of several clients."""

    def __init__(self, base_layer: nn.Module, scaling: float, dropout: nn.Module, stack: Stack):
        super().__init__()
        self.base_layer = base_layer
        self.scaling = scaling
        self.dropout = dropout
        self._disable_adapters = False
        self._stack = [stack]  # a list: the stack is no submodule
        self.a: Tensor
        self.b: Tensor

    @property
    def weight(self) -> Tensor:
        """The frozen weight; some models read its type."""
        return self.base_layer.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:  # [blocks of rows..., in] -> [..., out]
        if self._disable_adapters:
            return self.base_layer(x)
        stack = self._stack[0]
        if stack.spreads:
            y, wide = self.base_layer(x), self.dropout(x.to(self.a.dtype))
            low = OneAdapter.apply(stack.blocks(wide), self.a, self.b, self.scaling)
            return (y + stack.unblocks(low, y.shape)).to(y.dtype)
        a, b = stack.chosen(self.a), stack.chosen(self.b) * self.scaling
        if len(a) == 1:
            y, wide = self.base_layer(x), self.dropout(x.to(a.dtype))
            low = nn.functional.linear(nn.functional.linear(wide, a[0]), b[0])
            return (y + low).to(y.dtype)
        if self._whole(x, len(a)):
            weights = torch.baddbmm(self.weight, b, a)  # [clients, out, in]
            y = torch.bmm(stack.blocks(x), weights.transpose(1, 2))
            bias = getattr(self.base_layer, "bias", None)
            y = y if bias is None else y + bias
            return stack.unblocks(y, (*x.shape[:-1], y.shape[-1]))
        y = self.base_layer(x)
        low = torch.bmm(stack.blocks(x.to(a.dtype)), a.transpose(1, 2))  # [clients, entries, rank]
        if stack.copies == 1 and y.dtype == b.dtype:
            return torch.baddbmm(stack.blocks(y), low, b.transpose(1, 2)).view(y.shape)
        return (y + stack.unblocks(torch.bmm(low, b.transpose(1, 2)), y.shape)).to(y.dtype)

    def _whole(self, x: Tensor, clients: int) -> bool:
        """Whether one whole weight per client is faster than two thin products.

        A product with the rank as one side runs at a fraction of the speed of a wide product. Small
        layers with many entries are therefore faster with ``W + B A``, despite more operations.
        """
        if x.device.type != "cpu" or not isinstance(self.base_layer, nn.Linear):
            return False
        if x.dtype != self.a.dtype or self.weight.dtype != x.dtype or self.weight.is_meta:
            return False
        out, into = self.weight.shape
        entries, rank = x.numel() // into // clients, self.a.shape[1]
        thin = 3 * rank * entries * (into + out)
        return thin > 3 * rank * into * out + into * out * entries / THIN


class OneAdapter(torch.autograd.Function):
    """The product with one adapter for all places, and the gradient of every place.

    The products are as wide as those of a single client. Only the gradients of the factors are
    computed place by place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """``[places, entries, in] -> [..., out]``; ``a`` and ``b`` repeat one factor each."""
        low = nn.functional.linear(x, a[0])
        ctx.scaling = scaling
        ctx.save_for_backward(x, low, a, b)
        return nn.functional.linear(low, scaling * b[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, low, a, b = ctx.saved_tensors
        inner = grad @ (ctx.scaling * b[0])  # [places, entries, rank]
        of_x = inner @ a[0] if ctx.needs_input_grad[0] else None
        of_a = torch.bmm(inner.transpose(1, 2), x) if ctx.needs_input_grad[1] else None
        of_b = None
        if ctx.needs_input_grad[2]:
            # The factor with the rank comes first: the other order takes four times as long.
            of_b = torch.bmm((ctx.scaling * low).transpose(1, 2), grad).transpose(1, 2)
        return of_x, of_a, of_b, None


class Stack:
    """A PEFT model whose LoRA layers have been replaced by stacked ones.

    Attributes:
        params: PEFT's name of a factor -> the stacked parameter ``[clients, ...]``.
        spreads: whether all places share one adapter, see :meth:`spread`.
        active: the clients of the next batches, by their places in the stack.
        copies: how often a batch repeats its blocks: 2 for pairs of answers, else 1.
    """

    def __init__(self, model: Any):
        self.model = model
        self.params: dict[str, nn.Parameter] = {}
        self.copies = 1
        self.active: list[int] = []
        self._count = self._rows = 0  # active clients; rows of all active clients together
        self._uniform = functools.cache(lambda: True)
        self._active: dict[torch.device, Tensor] | None = None
        self.spreads = False
        self.layers: dict[str, StackedLora] = {}
        for name, layer in list(model.named_modules()):
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
                of_layer = layer.scaling["default"], layer.lora_dropout["default"]
                stacked = StackedLora(layer.base_layer, *of_layer, self)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, stacked)
                self.layers[name] = stacked

    def load(self, trees: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        """Loads the adapters of some clients, replacing the previous adapters.

        Args:
            trees: the adapters.
            device: the device of the model. Where it is spread over several, a factor goes to the
                device of its layer.
        """
        self._active, places = None, self.places(device)
        names = list(trees[0])
        same = len(trees) == self.clients and self.params.keys() == set(names) and not self.spreads
        self.spreads = False
        with torch.no_grad():
            for name in names:
                stacked = torch.stack([tree[name] for tree in trees]).to(places[name])
                if same:
                    self.params[name].copy_(stacked)
                else:
                    self.params[name] = nn.Parameter(stacked)
        self._place()

    def places(self, device: torch.device) -> dict[str, torch.device]:
        """The device of each factor, see :meth:`load`."""
        found = {name: place_of(layer.base_layer, device) for name, layer in self.layers.items()}
        return {f"{name}.lora_{f}.weight": found[name] for name in found for f in "AB"}

    def spread(self, tree: Mapping[str, Tensor], places: int, trains: Select) -> None:
        """Loads one adapter for several places, without copies; each place has its own gradient.

        Args:
            tree: the adapter, each factor on the device of its layer.
            places: the number of places.
            trains: selects the factors that get a gradient.
        """
        self._active, self.spreads = None, True
        for name, tensor in tree.items():
            shared = tensor.detach().expand(places, *tensor.shape)
            self.params[name] = nn.Parameter(shared, requires_grad=trains(name))
        self._place()

    def _place(self) -> None:
        for name, layer in self.layers.items():
            layer.a = self.params[f"{name}.lora_A.weight"]
            layer.b = self.params[f"{name}.lora_B.weight"]

    @property
    def clients(self) -> int:
        """How many adapters are loaded."""
        return len(next(iter(self.params.values()))) if self.params else 0

    def trees(self) -> list[Tree]:
        """Copies of the clients' adapters, on the CPU: views of one copy of the stack."""
        copies = {n: p.detach().to("cpu", copy=True) for n, p in self.params.items()}
        columns = (t.unbind() for t in copies.values())
        return [dict(zip(copies, own, strict=True)) for own in zip(*columns, strict=True)]

    def activate(self, clients: Sequence[int]) -> None:
        """Sets the clients of the next batches: in this order, with equally many rows each."""
        self._count = len(clients)
        whole = list(clients) == list(range(self.clients))
        devices = {p.device for p in self.params.values()}
        self._active = None if whole else {d: torch.tensor(clients, device=d) for d in devices}
        self.active = list(clients)

    def narrow(self, clients: Sequence[int], rows: int) -> None:
        """Sets the clients of the next batches, and their rows, whose layers all see rows."""
        self.activate(clients)
        self.batch(rows, 1, lambda: True)

    def batch(self, rows: int, copies: int, uniform: Callable[[], bool]) -> None:
        """Describes the next batch. This holds until the next call, so in the backward pass too.

        Args:
            rows: number of rows, of all active clients together.
            copies: how often the batch repeats all blocks, one repetition after the other.
            uniform: returns whether every row adds the same number of entries to every layer.
                Called only if a layer's first axis is not the rows.
        """
        self._rows, self.copies, self._uniform = rows, copies, functools.cache(uniform)

    def chosen(self, stacked: Tensor) -> Tensor:
        """The active clients' factors."""
        return stacked if self._active is None else stacked[self._active[stacked.device]]

    def blocks(self, x: Tensor) -> Tensor:
        """``[copies * clients * n, ..., in]`` -> ``[clients, copies * entries, in]``.

        Raises:
            Ragged: the first axis is not the rows, and rows may add different numbers of entries.
        """
        rows = self.copies * self._rows
        if len(x) != rows and (len(x) % (self.copies * self._count) or not self._uniform()):
            raise Ragged(f"{len(x)} entries of {rows} rows that differ in size")
        if self.copies == 1:
            return x.reshape(self._count, -1, x.shape[-1])
        split = x.reshape(self.copies, self._count, -1, x.shape[-1])
        return split.transpose(0, 1).reshape(self._count, -1, x.shape[-1])

    def unblocks(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of :meth:`blocks`, in the given shape."""
        if self.copies > 1:
            split = rows.view(self._count, self.copies, -1, rows.shape[-1])
            rows = split.transpose(0, 1)
        return rows.reshape(shape)


class Ragged(ValueError):
    """A layer's entries cannot be assigned to rows."""

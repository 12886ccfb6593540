"""Many clients' LoRA factors on one frozen base: the batch is the clients' batches side by side.

Every LoRA layer holds stacked factors, ``A [clients, rank, in]`` and ``B [clients, out, rank]``.
The base layer sees all rows at once; the factors' products are batched over the clients. Where the
clients' mean losses are summed, no gradient crosses clients, so one backward pass and one
elementwise optimizer train every client as if it were alone.

The rows of a batch lie in blocks of equal size, a block a client. A layer finds them again by
dividing its first axis, which holds wherever every row contributes as many entries to it: tokens,
patches or windows. Batches for which that is not so (pictures of different sizes in models that
pack patches) are trained a client at a time, see :func:`uniform`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedvlm.tree import Tree


class StackedLora(nn.Module):
    """A frozen linear layer with LoRA factors of several clients."""

    def __init__(self, base_layer: nn.Module, scaling: float, stack: Stack):
        super().__init__()
        self.base_layer = base_layer
        self.scaling = scaling
        self._disable_adapters = False
        self._stack = [stack]  # a list: the stack is no submodule
        self.a: Tensor
        self.b: Tensor

    def forward(self, x: Tensor) -> Tensor:  # [blocks of rows..., in] -> [..., out]
        y = self.base_layer(x)
        if self._disable_adapters:
            return y
        stack = self._stack[0]
        a, b = stack.chosen(self.a), stack.chosen(self.b)
        wide = x.to(a.dtype)
        if len(a) == 1:
            low = nn.functional.linear(nn.functional.linear(wide, a[0]), b[0])
            return (y + low * self.scaling).to(y.dtype)
        rows = stack.blocks(wide)  # [clients, entries, in]
        low = torch.bmm(torch.bmm(rows, a.transpose(1, 2)), b.transpose(1, 2))
        return (y + stack.unblocks(low, y) * self.scaling).to(y.dtype)


class Stack:
    """A PEFT model whose LoRA layers have been replaced by stacked ones.

    Attributes:
        params: PEFT's name of a factor -> the stacked parameter ``[clients, ...]``.
        copies: how often a batch repeats its blocks: 2 for pairs of answers, else 1.
    """

    def __init__(self, model: Any):
        self.model = model
        self.params: dict[str, nn.Parameter] = {}
        self.copies = 1
        self._active: Tensor | None = None
        self.layers: dict[str, StackedLora] = {}
        for name, layer in list(model.named_modules()):
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
                stacked = StackedLora(layer.base_layer, layer.scaling["default"], self)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, stacked)
                self.layers[name] = stacked

    def load(self, trees: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        """Takes the adapters of some clients, in place of those before."""
        self._active = None
        names = list(trees[0])
        same = len(trees) == self.clients and self.params.keys() == set(names)
        with torch.no_grad():
            for name in names:
                stacked = torch.stack([tree[name] for tree in trees]).to(device)
                if same:
                    self.params[name].copy_(stacked)
                else:
                    self.params[name] = nn.Parameter(stacked)
        for name, layer in self.layers.items():
            layer.a = self.params[f"{name}.lora_A.weight"]
            layer.b = self.params[f"{name}.lora_B.weight"]

    @property
    def clients(self) -> int:
        """How many adapters are loaded."""
        return len(next(iter(self.params.values()))) if self.params else 0

    def tree(self, client: int) -> Tree:
        """A copy of one client's adapter, on the CPU."""
        return {n: p[client].detach().to("cpu", copy=True) for n, p in self.params.items()}

    def activate(self, clients: Sequence[int] | None = None) -> None:
        """Says whose rows the next batches hold, in this order; None: everyone's."""
        whole = clients is None or list(clients) == list(range(self.clients))
        device = next(iter(self.params.values())).device
        self._active = None if whole else torch.tensor(clients, device=device)

    def chosen(self, stacked: Tensor) -> Tensor:
        """The active clients' factors."""
        return stacked if self._active is None else stacked[self._active]

    def blocks(self, x: Tensor) -> Tensor:
        """``[copies * clients * n, ..., in]`` -> ``[clients, copies * entries, in]``."""
        count = self.clients if self._active is None else len(self._active)
        if len(x) % (count * self.copies):
            raise ValueError(f"{len(x)} rows are no {self.copies} x {count} equal blocks")
        rows = x.reshape(self.copies, count, -1, x.shape[-1])
        if self.copies == 1:
            return rows[0]
        return rows.transpose(0, 1).reshape(count, -1, x.shape[-1])

    def unblocks(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`blocks`, in the shape of ``like``."""
        if self.copies > 1:
            count, _, width = rows.shape
            rows = rows.view(count, self.copies, -1, width).transpose(0, 1)
        return rows.reshape(like.shape)

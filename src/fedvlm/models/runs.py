"""The factors of many clients in a few tensors: factors of one kind and size lie in one run.

A run is a parameter ``[pieces, clients, ranks, width]``. An A is a piece ``[rank, in]`` and a B is
a piece ``[rank, out]``, transposed, so that the rank comes first in every product that gives a
gradient: the other order takes four times as long on a CPU. The As of layers that read one tensor
can lie in one piece, one below the other. Optimizers and clipping work on runs, and each factor is
a view.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedvlm.tree import Select, Tree, factor

Block = tuple[str, ...]
"""The factors of one piece."""


@dataclass(frozen=True)
class Place:
    """The place of a factor.

    Attributes:
        run: the run of the factor.
        piece: the number of its piece.
        ranks: its part of the piece.
        turned: whether the piece is the transposed factor.
    """

    run: nn.Parameter
    piece: int
    ranks: slice
    turned: bool

    def piece_of(self, like: Tensor) -> Tensor:
        """``[clients, ranks, width]``: the part of a tensor with the shape of the run; a view."""
        return like[self.piece, :, self.ranks]

    def of(self, like: Tensor) -> Tensor:
        """The same in the shape of the factor, ``[clients, ...]``."""
        return self.piece_of(like).transpose(1, 2) if self.turned else self.piece_of(like)

    @property
    def grad(self) -> Tensor:
        """The gradient of the factor, ``[clients, ...]``; a view."""
        assert self.run.grad is not None, "this factor is not trained"
        return self.of(self.run.grad)


class Runs:
    """The adapters of some clients.

    Attributes:
        names: the names of the factors, in the order of the adapters.
        places: name -> place.
        trained: name -> place, for the factors that are trained.
        clients: how many adapters are loaded.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.places: dict[str, Place] = {}
        self.trained: dict[str, Place] = {}
        self.clients = 0
        self._blocks: list[tuple[nn.Parameter, list[Block]]] = []
        self._layout: object = None

    def load(
        self,
        trees: Sequence[Mapping[str, Tensor]],
        places: Mapping[str, torch.device],
        trains: Select | None = None,
        beside: Sequence[Block] = (),
    ) -> bool:
        """Loads adapters. The runs stay the same objects while the form of the adapters does.

        Args:
            trees: the adapter of each client.
            places: the device of each factor.
            trains: selects the trained factors; None: those of before, or all.
            beside: factors that may share a piece, if all of them are trained or none of them, and
                if they have one device.

        Returns:
            Whether the runs are new objects.
        """
        first = trees[0]
        if trains is None:
            trains = self.trained.__contains__ if self.names == list(first) else lambda _: True
        flags = {n: trains(n) for n in first}
        form = [(n, t.shape, t.dtype, flags[n]) for n, t in first.items()]
        layout = form, len(trees), [places[n] for n in first], tuple(beside)
        if fresh := layout != self._layout:
            self._lay_out(first, flags, len(trees), places, beside)
            self._layout = layout
        with torch.no_grad():
            for run, blocks in self._blocks:
                names = [n for block in blocks for n in block]
                alike = all(tree[n] is first[n] for tree in trees for n in names)
                chosen = trees[:1] if alike else trees  # a download is one object for all clients
                own = torch.stack([tree[n] for block in blocks for tree in chosen for n in block])
                turned = factor(blocks[0][0]) == "B"
                own = own.transpose(1, 2) if turned else own
                run.copy_(own.reshape(len(blocks), len(chosen), *run.shape[2:]))
        return fresh

    def _lay_out(
        self,
        tree: Mapping[str, Tensor],
        flags: Mapping[str, bool],
        clients: int,
        at: Mapping[str, torch.device],
        beside: Sequence[Block],
    ) -> None:
        kinds: defaultdict[tuple[object, ...], list[Block]] = defaultdict(list)
        for block in _blocks(tree, {n: (flags[n], at[n]) for n in tree}, beside):
            name = block[0]
            kind = factor(name), flags[name], at[name], len(block), tree[name].shape
            kinds[kind].append(block)
        self.names, self.clients = list(tree), clients
        self.places, self.trained, self._blocks = {}, {}, []
        for blocks in kinds.values():
            name = blocks[0][0]
            turned = factor(name) == "B"
            rank, width = tree[name].mT.shape if turned else tree[name].shape
            size = len(blocks), clients, len(blocks[0]) * rank, width
            run = nn.Parameter(
                torch.empty(size, dtype=tree[name].dtype, device=at[name]),
                requires_grad=flags[name],
            )
            run.grad = torch.zeros_like(run) if flags[name] else None
            self._blocks.append((run, blocks))
            for piece, block in enumerate(blocks):
                for k, member in enumerate(block):
                    ranks = slice(k * rank, (k + 1) * rank)
                    self.places[member] = Place(run, piece, ranks, turned)
        self.places = {name: self.places[name] for name in self.names}
        self.trained = {n: p for n, p in self.places.items() if flags[n]}

    def of_factor(self) -> dict[str, list[nn.Parameter]]:
        """The trained runs by factor, ``A`` and ``B``."""
        found: dict[str, list[nn.Parameter]] = {"A": [], "B": []}
        for run, blocks in self._blocks:
            if run.requires_grad:
                found[factor(blocks[0][0])].append(run)
        return found

    @property
    def all(self) -> list[nn.Parameter]:
        """The runs, which hold all factors of all clients."""
        return [run for run, _ in self._blocks]

    @property
    def all_trained(self) -> list[nn.Parameter]:
        """The trained runs."""
        return [run for run, _ in self._blocks if run.requires_grad]

    def zero_grad(self) -> None:
        """Clears the gradients, which stay where they are."""
        grads = [run.grad for run in self.all_trained if run.grad is not None]
        if grads:
            torch._foreach_zero_(grads)

    def trees(self) -> list[Tree]:
        """Copies of the clients' adapters, on the CPU: views of one copy of each run."""
        copies = {}
        for run, blocks in self._blocks:
            own = run.detach()
            if factor(blocks[0][0]) == "B":
                own = own.transpose(2, 3).clone(memory_format=torch.contiguous_format)
            copies[run] = own.to("cpu", copy=own.data_ptr() == run.data_ptr())
        columns = []
        for place in self.places.values():
            own = copies[place.run][place.piece]  # [clients, ...]
            columns.append((own if place.turned else own[:, place.ranks]).unbind())
        return [dict(zip(self.places, own, strict=True)) for own in zip(*columns, strict=True)]


def _blocks(
    tree: Mapping[str, Tensor], kinds: Mapping[str, object], beside: Sequence[Block]
) -> list[Block]:
    """The factors of each piece, in the order of the adapter."""
    found: list[Block] = []
    taken: set[str] = set()
    of = {name: block for block in beside for name in block}
    for name in tree:
        block = of.get(name, (name,))
        alike = all(n in tree and tree[n].shape == tree[name].shape for n in block)
        if not alike or len({kinds[n] for n in block}) > 1:
            block = (name,)
        if name not in taken:
            found.append(block)
            taken |= set(block)
    return found

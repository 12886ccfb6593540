"""The rows of a batch of several clients: one block of rows for each client."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Blocks:
    """The clients of a batch, and the places of their rows in it.

    Attributes:
        active: the clients of the next batches, by their places among the loaded adapters.
        stamp: an object that stands for this choice of clients from these adapters.
        count: the number of active clients.
        copies: how often a batch repeats its blocks: 2 for pairs of answers, else 1.
    """

    def __init__(self) -> None:
        self.active: list[int] = []
        self._neighbours: slice | None = slice(None)
        self._places: dict[torch.device, Tensor] = {}  # of clients that are no neighbours
        self.stamp = object()
        self.copies = 1
        self.count = self._rows = 0  # active clients; rows of all active clients together
        self._uniform = functools.cache(lambda: True)

    def renew(self) -> None:
        """Notes that other adapters are loaded."""
        self.stamp = object()

    def choose(self, clients: Sequence[int]) -> None:
        """Sets the clients of the next batches: in this order, with equally many rows each."""
        self.count, self.active = len(clients), list(clients)
        first = self.active[0]
        if self.active == list(range(first, first + self.count)):
            chosen = slice(first, first + self.count)
            if self._neighbours == chosen:
                return
            self._neighbours = chosen
        else:
            self._neighbours, self._places = None, {}
        self.stamp = object()

    def clients_of_batch(self, device: torch.device) -> slice | Tensor:
        """The active clients, as an index of an axis of clients on a device."""
        if self._neighbours is not None:
            return self._neighbours
        if device not in self._places:
            self._places[device] = torch.tensor(self.active, device=device)
        return self._places[device]

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
        """The active clients' part of ``[clients, ...]``: a view where they are neighbours."""
        return stacked[self.clients_of_batch(stacked.device)]

    @property
    def side_by_side(self) -> bool:
        """Whether the blocks of a batch are its rows in their order."""
        return self.copies == 1 or self.count == 1

    def blocks(self, x: Tensor) -> Tensor:
        """``[copies * clients * n, ..., in]`` -> ``[clients, copies * entries, in]``.

        Raises:
            Ragged: the first axis is not the rows, and rows may add different numbers of entries.
        """
        count, copies, entries, width = self.count, self.copies, x.shape[0], x.shape[-1]
        if count == 1:
            return x.reshape(1, -1, width)
        if entries != copies * self._rows and (entries % (copies * count) or not self._uniform()):
            raise Ragged(f"{entries} entries of {copies * self._rows} rows that differ in size")
        if copies == 1:
            return x.reshape(count, -1, width)
        split = x.reshape(copies, count, -1, width)
        return split.transpose(0, 1).reshape(count, -1, width)

    def unblocks(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of :meth:`blocks`, in the given shape."""
        if not self.side_by_side:
            split = rows.view(self.count, self.copies, -1, rows.shape[-1])
            rows = split.transpose(0, 1)
        return rows.reshape(shape)


class Ragged(ValueError):
    """A layer's entries cannot be assigned to rows."""

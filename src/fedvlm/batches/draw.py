"""Which rows a client trains on at each step: a function of seeds alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

Batches = Mapping[int, np.ndarray]
"""Place of a client in a pass -> the rows of its batch."""


class Length(NamedTuple):
    """How batches are sorted, see :func:`batches`.

    Attributes:
        of: the length of a row in tokens.
        seed: of the batches' order.
    """

    of: Callable[[int], int]
    seed: int


def batches(
    rows: np.ndarray, size: int, steps: int, seed: int, length: Length | None = None
) -> Iterator[np.ndarray]:
    """``steps`` batches: the rows shuffled, in pieces of ``size``, shuffled anew when used up.

    With ``length``, the rows that a round takes of a shuffle are sorted before they are cut, and
    the pieces are shuffled: a batch holds rows of like length.

    Args:
        rows: the client's.
        size: rows of a batch.
        steps: how many.
        seed: of the shuffles of the rows.
        length: of a row, and the seed of the pieces' shuffles. Where that seed is the same for all,
            clients side by side have their long batches at the same step.
    """
    order = np.random.default_rng(seed)
    counts = [-(-taken // size) for taken in _taken(len(rows), size, steps)]
    turns = _turns(length.seed, tuple(counts)) if length else [range(n) for n in counts]
    for turn in turns:
        taken = order.permutation(rows)[: steps * size]
        if length:
            lengths = [length.of(row) for row in taken.tolist()]
            taken = taken[sorted(range(len(taken)), key=lengths.__getitem__)]
        cut = pieces(taken, size)
        yield from (cut[n] for n in turn)
        steps -= len(cut)


def _taken(rows: int, size: int, steps: int) -> Iterator[int]:
    """The number of rows that are taken of each shuffle."""
    while steps:
        yield min(rows, steps * size)
        steps -= -(-min(rows, steps * size) // size)


@lru_cache(1024)
def _turns(seed: int, counts: tuple[int, ...]) -> list[list[int]]:
    """The order of the pieces of each shuffle; clients of one size have the same."""
    common = np.random.default_rng(seed)
    return [common.permutation(count).tolist() for count in counts]


def pieces(rows: np.ndarray, size: int | None) -> list[np.ndarray]:
    """The rows in order, ``size`` at a time; None: all at once."""
    size = size or len(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def beside(drawn: Batches) -> tuple[np.ndarray, int]:
    """Rows of several clients in blocks of equal size, and this size."""
    sizes = [len(rows) for rows in drawn.values()]
    size = max(sizes)
    alike = min(sizes) == size
    return np.concatenate([rows if alike else filled(rows, size) for rows in drawn.values()]), size


class Part(NamedTuple):
    """A micro-batch of each of some clients.

    Attributes:
        drawn: the clients' rows.
        rows: these rows in blocks of equal size.
        size: the number of rows of a block.
    """

    drawn: Batches
    rows: np.ndarray
    size: int


def parts_of(drawn: Batches, most: int | None) -> list[Part]:
    """The clients' batches side by side, at most ``most`` rows of a client at a time; None: all."""
    cut = {k: pieces(rows, most) for k, rows in drawn.items()}
    count = max(map(len, cut.values()))
    parts = ({k: own[n] for k, own in cut.items() if n < len(own)} for n in range(count))
    return [Part(part, *beside(part)) for part in parts]


def filled(rows: np.ndarray, size: int) -> np.ndarray:
    """``size`` rows: the last row is repeated as often as necessary."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows))])

"""Which rows a client trains on at each step: a function of seeds alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np


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
    order, common = np.random.default_rng(seed), np.random.default_rng(length and length.seed)
    while steps:
        taken = order.permutation(rows)[: steps * size]
        if length:
            taken = taken[np.argsort([length.of(int(row)) for row in taken], kind="stable")]
        cut = pieces(taken, size)
        yield from (cut[n] for n in common.permutation(len(cut))) if length else cut
        steps -= len(cut)


def pieces(rows: np.ndarray, size: int | None) -> list[np.ndarray]:
    """The rows in order, ``size`` at a time; None: all at once."""
    size = size or len(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def beside(drawn: Mapping[int, np.ndarray]) -> tuple[np.ndarray, int]:
    """Rows of several clients in blocks of equal size, and this size."""
    size = max(map(len, drawn.values()))
    return np.concatenate([filled(rows, size) for rows in drawn.values()]), size


def filled(rows: np.ndarray, size: int) -> np.ndarray:
    """``size`` rows: the last row is repeated as often as necessary."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows))])

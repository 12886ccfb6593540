"""How a client's labels differ from everyone's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_KEPT = 8  # most frequent labels that are kept of a client
_FREQUENT = 12  # labels of which every client's count is kept
_CANDIDATES = 1000  # most frequent labels that these are chosen from


@dataclass(frozen=True)
class Skew:
    """One client's labels (answers, or the column that the partition is by).

    Attributes:
        divergence: Jensen-Shannon divergence (base 2, so 0 to 1) of the client's distribution of
            labels from that of all rows (Lin 1991); 0 where they are alike.
        distinct: number of different labels that the client has.
        top: its most frequent labels and their counts, at most eight.
        counts: how often it has each of the labels in :attr:`Partition.frequent`, in their order.
    """

    divergence: float
    distinct: int
    top: tuple[tuple[str, int], ...]
    counts: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        top = [list(pair) for pair in self.top]
        tree = {"divergence": self.divergence, "distinct": self.distinct, "top": top}
        return {**tree, "counts": list(self.counts)}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Skew:
        """What :meth:`to_dict` wrote."""
        top = tuple((str(text), int(count)) for text, count in tree["top"])
        counts = tuple(int(count) for count in tree["counts"])
        return cls(float(tree["divergence"]), int(tree["distinct"]), top, counts)


def frequent(everyones: np.ndarray, parts: Collection[np.ndarray], count: int) -> np.ndarray:
    """Positions of the labels that tell the clients apart, at most twelve, the most frequent first.

    Half are those that most rows have; each other one is the most frequent label of the client of
    which the fewest rows have one of the labels so far. Each is on at least two rows.

    Args:
        everyones: the labels of all rows, as positions.
        parts: each client's rows.
        count: number of labels.
    """
    totals = np.bincount(everyones, minlength=count)
    often = np.argsort(-totals, kind="stable")[:_CANDIDATES]
    often = often[totals[often] > 1]
    mine = [np.bincount(everyones[part], minlength=count)[often] / len(part) for part in parts]
    left = np.stack(mine)  # [clients, labels], shares of the labels that are not chosen yet
    covered = np.zeros(len(left))
    chosen: list[int] = []
    while len(chosen) < min(_FREQUENT, len(often)):
        label = next(at for at in range(len(often)) if at not in chosen)
        if len(chosen) >= _FREQUENT // 2:
            unlike = left[covered.argmin()]
            label = int(unlike.argmax()) if unlike.any() else label
        chosen.append(label)
        covered += left[:, label]
        left[:, label] = 0
    return often[sorted(chosen)]


def measure(mine: np.ndarray, everyones: np.ndarray, names: list[str], often: np.ndarray) -> Skew:
    """The skew of one client.

    Args:
        mine: the client's labels, as positions in ``names``.
        everyones: the labels of all rows.
        names: the labels' texts.
        often: positions of the labels whose counts are kept, see :func:`frequent`.
    """
    counts = np.bincount(mine, minlength=len(names))
    totals = np.bincount(everyones, minlength=len(names))
    mostly = np.argsort(-counts, kind="stable")[:_KEPT]
    top = tuple((names[i], int(counts[i])) for i in mostly if counts[i])
    divergence = jensen_shannon(counts, totals)
    return Skew(divergence, int((counts > 0).sum()), top, tuple(counts[often].tolist()))


def jensen_shannon(one: np.ndarray, other: np.ndarray) -> float:
    """Jensen-Shannon divergence in bits of two distributions, given as counts."""
    p, q = one / one.sum(), other / other.sum()
    middle = (p + q) / 2
    return float(np.clip((_relative(p, middle) + _relative(q, middle)) / 2, 0.0, 1.0))


def _relative(p: np.ndarray, q: np.ndarray) -> float:
    """Kullback-Leibler divergence in bits; 0 log 0 is 0."""
    some = p > 0
    return float(np.sum(p[some] * np.log2(p[some] / q[some])))

"""How a client's labels differ from everyone's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_KEPT = 8  # most frequent labels that are kept


@dataclass(frozen=True)
class Skew:
    """One client's labels (answers, or the column that the partition is by).

    Attributes:
        divergence: Jensen-Shannon divergence (base 2, so 0 to 1) of the client's distribution of
            labels from that of all rows (Lin 1991); 0 where they are alike.
        distinct: number of different labels that the client has.
        top: its most frequent labels and their counts, at most eight.
    """

    divergence: float
    distinct: int
    top: tuple[tuple[str, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        top = [list(pair) for pair in self.top]
        return {"divergence": self.divergence, "distinct": self.distinct, "top": top}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Skew:
        """What :meth:`to_dict` wrote."""
        top = tuple((str(text), int(count)) for text, count in tree["top"])
        return cls(float(tree["divergence"]), int(tree["distinct"]), top)


def measure(mine: np.ndarray, everyones: np.ndarray, names: list[str]) -> Skew:
    """The skew of one client.

    Args:
        mine: the client's labels, as positions in ``names``.
        everyones: the labels of all rows.
        names: the labels' texts.
    """
    counts = np.bincount(mine, minlength=len(names))
    totals = np.bincount(everyones, minlength=len(names))
    often = np.argsort(-counts, kind="stable")[:_KEPT]
    top = tuple((names[i], int(counts[i])) for i in often if counts[i])
    return Skew(jensen_shannon(counts, totals), int((counts > 0).sum()), top)


def jensen_shannon(one: np.ndarray, other: np.ndarray) -> float:
    """Jensen-Shannon divergence in bits of two distributions, given as counts."""
    p, q = one / one.sum(), other / other.sum()
    middle = (p + q) / 2
    return float(np.clip((_relative(p, middle) + _relative(q, middle)) / 2, 0.0, 1.0))


def _relative(p: np.ndarray, q: np.ndarray) -> float:
    """Kullback-Leibler divergence in bits; 0 log 0 is 0."""
    some = p > 0
    return float(np.sum(p[some] * np.log2(p[some] / q[some])))

"""Measures how a client's labels differ from the labels of all rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

_KEPT = 8  # number of a client's most frequent labels that are kept
_FREQUENT = 12  # number of labels that are counted for every client
_CANDIDATES = 1000  # these labels are chosen from so many of the most frequent ones


@dataclass(frozen=True, slots=True)
class Skew:
    """One client's labels: answers, or values of the column of the partition.

    Attributes:
        divergence: Jensen-Shannon divergence (base 2, so 0 to 1) between the client's distribution
            of labels and that of all rows (Lin 1991); 0 if they are equal.
        distinct: number of different labels of the client.
        top: its most frequent labels and their counts, at most eight.
        counts: its count of each label in :attr:`Partition.frequent`, in their order.
    """

    divergence: float
    distinct: int
    top: tuple[tuple[str, int], ...]
    counts: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Gives plain lists, numbers and strings, for JSON."""
        top = [list(pair) for pair in self.top]
        tree = {"divergence": self.divergence, "distinct": self.distinct, "top": top}
        return {**tree, "counts": list(self.counts)}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Skew:
        """Reads the output of :meth:`to_dict`."""
        top = tuple((str(text), int(count)) for text, count in tree["top"])
        counts = tuple(int(count) for count in tree["counts"])
        return cls(float(tree["divergence"]), int(tree["distinct"]), top, counts)


def frequent(everyones: np.ndarray, parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Chooses at most twelve labels that distinguish the clients.

    The first half are the most frequent labels. Each further label is chosen for one client: the
    one with the smallest share of rows that have a chosen label. It is the most frequent label of
    this client. Every chosen label is on at least two rows.

    Args:
        everyones: the labels of all rows, as positions.
        parts: each client's rows.
        count: number of labels.

    Returns:
        The positions of the chosen labels, the most frequent first.
    """
    totals = np.bincount(everyones, minlength=count)
    often = np.argsort(-totals, kind="stable")[:_CANDIDATES]
    often = often[totals[often] > 1]
    sizes = np.array([len(part) for part in parts])
    labels, ends = everyones[np.concatenate(parts)], np.cumsum(sizes)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    covered = np.zeros(len(sizes))  # share of each client's rows with a chosen label
    chosen: list[int] = []
    while len(chosen) < min(_FREQUENT, len(often)):
        label = next(at for at in range(len(often)) if at not in chosen)
        if len(chosen) >= _FREQUENT // 2:
            least = covered.argmin()
            mine = labels[ends[least] - sizes[least] : ends[least]]
            unlike = np.bincount(mine, minlength=count)[often]
            unlike[chosen] = 0
            label = int(unlike.argmax()) if unlike.any() else label
        chosen.append(label)
        covered += np.bincount(owners[labels == often[label]], minlength=len(sizes)) / sizes
    return often[sorted(chosen)]


def measure(
    everyones: np.ndarray, parts: Sequence[np.ndarray], names: list[str], often: np.ndarray
) -> Iterator[Skew]:
    """Yields the skew of each client.

    Args:
        everyones: the labels of all rows, as positions in ``names``.
        parts: each client's rows.
        names: the texts of the labels.
        often: positions of the labels to count for every client, see :func:`frequent`.
    """
    sizes = np.array([len(part) for part in parts])
    owners = np.repeat(np.arange(len(sizes)), sizes)
    pairs = owners * len(names) + everyones[np.concatenate(parts)]
    pairs, counts = np.unique(pairs, return_counts=True)
    owners, labels = np.divmod(pairs, len(names))  # client and label of each count
    divergences = _divergences(owners, counts, np.bincount(everyones)[labels], sizes)
    places = np.full(len(names), -1)
    places[often] = np.arange(len(often))
    told = np.zeros((len(sizes), len(often)), np.int64)  # [clients, frequent labels]
    some = places[labels] >= 0
    told[owners[some], places[labels[some]]] = counts[some]
    order = np.lexsort((labels, -counts, owners))
    ends = np.cumsum(np.bincount(owners, minlength=len(sizes)))
    for client, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        mostly = order[start : min(end, start + _KEPT)]
        top = zip(labels[mostly].tolist(), counts[mostly].tolist(), strict=True)
        yield Skew(
            float(divergences[client]),
            end - start,
            tuple((names[label], count) for label, count in top),
            tuple(told[client].tolist()),
        )


def _divergences(
    owners: np.ndarray, mine: np.ndarray, everyones: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Jensen-Shannon divergences, in bits, between each client's labels and those of all rows.

    The first three arrays have one entry for each pair of a client and one of its labels.

    Args:
        owners: the client.
        mine: number of the client's rows with the label.
        everyones: number of all rows with the label.
        sizes: number of rows of each client.
    """
    total = sizes.sum()
    p, q = mine / sizes[owners], everyones / total
    middle = (p + q) / 2
    bits = p * np.log2(p / middle) + q * np.log2(q / middle)
    known = np.bincount(owners, everyones, len(sizes))
    # For a label that a client lacks, the middle is q / 2: this gives q times one bit.
    found = np.bincount(owners, bits, len(sizes)) + (total - known) / total
    return np.clip(found / 2, 0.0, 1.0)

"""Ranks over the cells of the personalization benchmark, with ties.

Two algorithms are compared by the scores of the same clients in the same runs
(:mod:`_personalization.bootstrap`). They are tied where the mean of the differences is within one
standard error of zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from _personalization.bootstrap import difference
from fedvlm.metrics import mean

Pairs = Mapping[Any, float]  # (seed, client) -> score
Scores = Mapping[str, Pairs]  # algorithm -> its scores in one cell
ROUNDING = 1e-12


@dataclass(frozen=True)
class Overview:
    """An algorithm over all cells.

    Attributes:
        algorithm: name of the algorithm.
        rank: average rank over the cells; 1 is the best.
        won: number of cells in which it is the best or tied with the best.
        mean: mean score over the cells.
        places: cell -> rank.
    """

    algorithm: str
    rank: float
    won: int
    mean: float
    places: Mapping[Any, float]


def rounds_to(curve: Mapping[int, float], share: float = 0.9) -> int | None:
    """The first evaluated round with a share of the last round's value; None if that value is 0."""
    if not curve or curve[max(curve)] <= 0:
        return None
    goal = share * curve[max(curve)]
    return next(round_ for round_ in sorted(curve) if curve[round_] >= goal - ROUNDING)


def beats(ours: Pairs, theirs: Pairs) -> bool:
    """Whether the lead of ``ours`` is larger than one standard error."""
    lead = difference(ours, theirs)
    return lead.value > lead.error + ROUNDING


def ranks(scores: Scores) -> dict[str, float]:
    """Rank of each algorithm: 1, plus 1 for each better algorithm, plus 1/2 for each tied one."""
    found = {}
    for name, own in scores.items():
        others = [theirs for other, theirs in scores.items() if other != name]
        ahead = sum(beats(theirs, own) for theirs in others)
        tied = sum(not beats(theirs, own) and not beats(own, theirs) for theirs in others)
        found[name] = 1.0 + ahead + tied / 2
    return found


def best(scores: Scores) -> str:
    """The algorithm with the highest mean over its pairs; the first one of equal means."""
    return max(scores, key=lambda name: mean(scores[name].values()))


def winners(scores: Scores) -> set[str]:
    """The best algorithm, and the algorithms that it does not beat."""
    if not scores:
        return set()
    top = scores[best(scores)]
    return {name for name, own in scores.items() if not beats(top, own)}


def common(scores: Scores) -> dict[str, dict[Any, float]]:
    """The scores in the pairs that all algorithms of a cell have."""
    shared = frozenset.intersection(*map(frozenset, scores.values())) if scores else frozenset()
    return {name: {p: s for p, s in own.items() if p in shared} for name, own in scores.items()}


def block(cells: Mapping[Any, Scores]) -> tuple[list[str], list[Any]]:
    """The largest block of the results: algorithms, and the cells with common pairs of them all.

    The most frequent algorithms come first. The block has as many results (algorithms times cells)
    as possible, of at least two algorithms where there are two.
    """
    count = Counter(name for scores in cells.values() for name in scores)
    order = [name for name, _ in count.most_common()]
    found: tuple[list[str], list[Any]] = order[:1], [c for c in cells if order[0] in cells[c]]
    for number in range(2, len(order) + 1):
        names = order[:number]
        some = [c for c, own in cells.items() if _complete(own, names)]
        if some and (len(found[0]) < 2 or number * len(some) >= len(found[0]) * len(found[1])):
            found = names, some
    return found


def _complete(scores: Scores, names: Iterable[str]) -> bool:
    some = {name: scores.get(name, {}) for name in names}
    return all(common(some).values())


def overview(cells: Mapping[Any, Scores], algorithms: Sequence[str]) -> list[Overview]:
    """The algorithms over cells that have them all, the best average rank first."""
    compared = {c: common({a: scores[a] for a in algorithms}) for c, scores in cells.items()}
    placed = {c: ranks(scores) for c, scores in compared.items()}
    won = {c: winners(scores) for c, scores in compared.items()}
    found = [
        Overview(
            name,
            mean(place[name] for place in placed.values()),
            sum(name in names for names in won.values()),
            mean(mean(scores[name].values()) for scores in compared.values()),
            {c: place[name] for c, place in placed.items()},
        )
        for name in algorithms
    ]
    return sorted(found, key=lambda row: row.rank)

"""Ranks over the cells of the personalization benchmark, with ties.

Seeds are pairs: with one seed all algorithms have the same rows, partition and initial weights. So
the comparison of two algorithms uses the mean of their differences over the seeds. They are tied
where that mean is within one standard error of zero. A single seed has no standard error. Then
only equal means are tied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedvlm.metrics import mean, standard_error

Seeds = Mapping[int, float]  # seed -> score
Scores = Mapping[str, Seeds]  # algorithm -> scores by seed, in one cell
ROUNDING = 1e-12


@dataclass(frozen=True)
class Overview:
    """An algorithm over all cells.

    Attributes:
        algorithm: name of the algorithm.
        rank: average rank over the cells; 1 is the best.
        won: number of cells in which it is the best or tied with the best.
        cells: number of compared cells.
        mean: mean score over the cells.
        worst10: mean over the cells of the scores of its worst clients.
    """

    algorithm: str
    rank: float
    won: int
    cells: int
    mean: float
    worst10: float


def rounds_to(curve: Mapping[int, float], share: float = 0.9) -> int | None:
    """The first evaluated round with a share of the last round's value; None if that value is 0."""
    if not curve or curve[max(curve)] <= 0:
        return None
    goal = share * curve[max(curve)]
    return next(round_ for round_ in sorted(curve) if curve[round_] >= goal - ROUNDING)


def lead(ours: Seeds, theirs: Seeds) -> tuple[float, float]:
    """Mean of ``ours - theirs`` over the common seeds, and its standard error (one seed: 0)."""
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    error = standard_error(pairs)
    return mean(pairs), 0.0 if math.isnan(error) else error


def beats(ours: Seeds, theirs: Seeds, errors: float = 1.0) -> bool:
    """Whether the lead of ``ours`` is larger than a number of standard errors."""
    ahead, error = lead(ours, theirs)
    return ahead > errors * error + ROUNDING


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
    """The algorithm with the highest mean over its seeds; the first one of equal means."""
    return max(scores, key=lambda name: mean(scores[name].values()))


def winners(scores: Scores) -> set[str]:
    """The best algorithm, and the algorithms that it does not beat."""
    top = scores[best(scores)]
    return {name for name, own in scores.items() if not beats(top, own)}


def clearly_behind(scores: Scores, name: str) -> bool:
    """Whether the best algorithm leads the named one by more than two standard errors."""
    return name in scores and beats(scores[best(scores)], scores[name], errors=2.0)


def complete(cells: Mapping[Any, Scores], algorithms: Iterable[str]) -> list[Any]:
    """The cells in which all given algorithms have the same seeds."""
    names = list(algorithms)
    return [
        cell
        for cell, scores in cells.items()
        if all(name in scores for name in names)
        and len({frozenset(scores[name]) for name in names}) == 1
    ]


def overview(
    cells: Mapping[Any, Scores], worst: Mapping[Any, Scores], algorithms: Sequence[str]
) -> list[Overview]:
    """The algorithms over all complete cells, the best average rank first.

    Args:
        cells: cell -> algorithm -> seed -> mean over the clients.
        worst: the same for the worst tenth of the clients.
        algorithms: the algorithms to rank.
    """
    compared = {c: {a: cells[c][a] for a in algorithms} for c in complete(cells, algorithms)}
    if not compared:
        return []
    placed = {c: ranks(scores) for c, scores in compared.items()}
    won = {c: winners(scores) for c, scores in compared.items()}
    found = [
        Overview(
            name,
            mean(place[name] for place in placed.values()),
            sum(name in names for names in won.values()),
            len(compared),
            mean(mean(scores[name].values()) for scores in compared.values()),
            mean(mean(worst[c][name].values()) for c in compared),
        )
        for name in algorithms
    ]
    return sorted(found, key=lambda row: row.rank)

"""The numbers behind the plots: scores by round, client and seed, from ``metrics.jsonl``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedvlm.errors import FedVLMError
from fedvlm.metrics import METRICS, mean

Line = Mapping[str, Any]
Scores = dict[str, float]  # client -> score


def metric_name(metric: str) -> str:
    """The name of a metric in a figure.

    Raises:
        FedVLMError: the metric is not a share in [0, 1].
    """
    shares = [name for name, m in METRICS.items() if m.share]
    if metric not in shares:
        raise FedVLMError(f"no plot of the metric '{metric}': choose one of {', '.join(shares)}")
    return METRICS[metric].head


def curve(lines: Iterable[Line], kind: str, metric: str) -> dict[int, Scores]:
    """Round -> scores of the clients evaluated in it; ``kind`` is ``personal`` or ``global``."""
    rounds = {int(line["round"]): _scores(line, kind, metric) for line in lines}
    return {round_: scores for round_, scores in sorted(rounds.items()) if scores}


def first_scores(lines: Sequence[Line], metric: str) -> Scores:
    """The score of every client before training (round 0)."""
    return curve(lines, "personal", metric).get(0) or curve(lines, "global", metric).get(0, {})


def last_scores(lines: Sequence[Line], kind: str, metric: str) -> Scores:
    """The latest score of every client after round 0. It may be older than the last evaluation."""
    latest: Scores = {}
    for round_, scores in curve(lines, kind, metric).items():
        latest |= scores if round_ > 0 else {}
    return latest


def end_scores(lines: Sequence[Line], metric: str) -> Scores:
    """:func:`last_scores` of the personal models, or of the global model without personal ones."""
    return last_scores(lines, best_kind(lines, metric), metric)


def last_round(lines: Sequence[Line], metric: str) -> int:
    """The last evaluated round; 0 without an evaluation."""
    return max(curve(lines, best_kind(lines, metric), metric), default=0)


def best_kind(lines: Sequence[Line], metric: str) -> str:
    """``personal`` where the run evaluated personal models, else ``global``."""
    return "personal" if curve(lines, "personal", metric) else "global"


def worst_tenth(scores: Mapping[str, float]) -> float:
    """Mean of the lowest tenth of the scores. The tenth is rounded down to at least one client."""
    return mean(sorted(scores.values())[: max(1, len(scores) // 10)])


def seed_curves(runs: Sequence[Sequence[Line]], metric: str) -> tuple[list[int], list[list[float]]]:
    """The rounds that every seed evaluated, and the mean over clients of each round and seed."""
    curves = [curve(lines, best_kind(lines, metric), metric) for lines in runs]
    curves = [scores for scores in curves if scores]
    rounds = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
    return rounds, [[mean(c[round_].values()) for c in curves] for round_ in rounds]


def mean_scores(seeds: Iterable[Scores]) -> Scores:
    """The mean score of every client over the seeds that scored it."""
    seeds = list(seeds)
    return {c: mean(s[c] for s in seeds if c in s) for c in client_names(seeds)}


def client_names(scores: Iterable[Mapping[str, float]]) -> list[str]:
    """All client names in natural order: site-2 before site-10."""
    names = {client for each in scores for client in each}
    return sorted(
        names,
        key=lambda n: [
            (not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in re.split(r"(\d+)", n) if p
        ],
    )


def _scores(line: Line, kind: str, metric: str) -> Scores:
    clients = (line.get("evaluation") or {}).get(kind) or {}
    found = {client: scores.get(metric) for client, scores in clients.items()}
    return {c: float(v) for c, v in found.items() if v is not None and not math.isnan(v)}


def capital(text: str) -> str:
    """A text with a capital first letter."""
    return text[:1].upper() + text[1:]

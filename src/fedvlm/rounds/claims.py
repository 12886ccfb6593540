"""What a comparison claims: gains over the baselines, and a verdict for every site.

Both are claimed only between runs of equal optimizer steps, and only where a 95 % interval says so.

A site's answers of each way of sharing are paired, row by row, with those of training alone. The
intervals of a site hold together: with ``k`` ways of sharing, each has the level ``1 - 0.05 / k``
(Bonferroni). So the best of several ways is not clear by luck alone. These intervals are over rows.
With one seed, they do not cover how much another run would differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedvlm.engines.base import Answer
from fedvlm.intervals import gain, paired
from fedvlm.metrics import mean
from fedvlm.rounds.results import Results, by

ALONE = "local"
BASELINES = (ALONE, "lora")
SHARES = {"fedsa": "share A", "plora": "share B", "lora": "share all", "auto": "use auto"}
"""Algorithm -> the verdict for a site that it serves best."""

STAY, UNCLEAR = "stay alone", "no clear difference"

Scores = dict[tuple[int, str, int, int], float]  # (seed, client, place, row) -> score


def steps(runs: Sequence[Results]) -> float | None:
    """Optimizer steps of all clients in a run, the mean over seeds; None where they are unknown."""
    counts = [run.table.get("steps") or 0 for run in runs]
    return mean(counts) if all(counts) else None


def _equal(results: Mapping[str, Sequence[Results]], one: str, other: str) -> bool:
    """Whether two algorithms have the same known number of steps."""
    if one not in results or other not in results:
        return False
    return steps(results[one]) == steps(results[other]) is not None


def gains(name: str, results: Mapping[str, Sequence[Results]]) -> dict[str, float | None]:
    """The gain of an algorithm over each baseline, as columns with their intervals.

    Scores are paired over (seed, client). The gain over a baseline that was not run, or that took
    another number of steps, is None.

    Args:
        name: the algorithm.
        results: algorithm -> its runs, one a seed.
    """
    columns: dict[str, float | None] = {}
    for baseline in BASELINES:
        found, bounds = None, None
        if _equal(results, name, baseline):
            pairs = [
                (score, theirs[client])
                for own, reference in zip(results[name], results[baseline], strict=True)
                for theirs in [reference.scores()]
                for client, score in own.scores().items()
            ]
            found, bounds = gain(*zip(*pairs, strict=True))
        low, high = bounds or (None, None)
        key = f"gain_over_{baseline}"
        columns |= {key: found, f"{key}_low": low, f"{key}_high": high}
    return columns


def verdicts(results: Mapping[str, Sequence[Results]]) -> list[dict[str, Any]]:
    """A verdict for every client; none without ``local`` or without a way of sharing.

    - A way of sharing of :data:`SHARES`: its score is clearly above that of training alone, and it
      is the highest of those that are.
    - :data:`STAY`: no way scores higher than training alone, and at least one is clearly lower.
    - :data:`UNCLEAR`: anything else.

    A difference is clear where its interval excludes zero.

    Args:
        results: algorithm -> its runs, one a seed. A way of sharing that took other steps than
            ``local`` is left out.

    Returns:
        One dict a client: ``client``, ``verdict``, ``n`` (paired rows of all seeds), ``local`` (the
        score of training alone), and ``algorithm``, ``gain``, ``low``, ``high``: the way of sharing
        that decides, its gain over training alone, and the interval of this gain. ``gains`` has the
        same for every way. All of them are shares, not per cent.
    """
    ways = [name for name in SHARES if _equal(results, name, ALONE)]
    if not ways:
        return []
    scores = {name: _scores(results[name]) for name in (ALONE, *ways)}
    clients = dict.fromkeys(client for _, client, *_ in scores[ALONE])
    found = (_verdict(client, scores, ways) for client in clients)
    return [verdict for verdict in found if verdict]


def _scores(runs: Sequence[Results]) -> Scores:
    return {
        (run.table["seed"], client, place, answer["row"]): answer[run.metric]
        for run in runs
        for client, answers in by("client", run.answers()).items()
        for place, answer in enumerate(answers)
    }


def _verdict(
    client: str, scores: Mapping[str, Scores], ways: Sequence[str]
) -> dict[str, Any] | None:
    rows = [row for row in scores[ALONE] if row[1] == client]
    rows = [row for row in rows if all(row in scores[way] for way in ways)]
    if not rows:
        return None
    alone = [scores[ALONE][row] for row in rows]
    gains = {}
    for way in ways:
        differences = [scores[way][row] - mine for row, mine in zip(rows, alone, strict=True)]
        low, high = paired(differences, looks=len(ways))
        gains[way] = {"gain": sum(differences) / len(rows), "low": low, "high": high}
    verdict, decides = _decided(gains)
    return {
        "client": client,
        "verdict": verdict,
        "n": len(rows),
        "local": sum(alone) / len(rows),
        "algorithm": decides,
        **gains[decides],
        "gains": gains,
    }


def _decided(gains: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """The verdict, and the way of sharing whose gain decides."""
    by_gain = sorted(gains, key=lambda way: -gains[way]["gain"])
    if better := [way for way in by_gain if gains[way]["low"] > 0]:
        return SHARES[better[0]], better[0]
    worse = [way for way in by_gain if gains[way]["high"] < 0]
    if worse and gains[by_gain[0]]["gain"] <= 0:
        return STAY, worse[0]
    return UNCLEAR, by_gain[0]


def harm(gains: Mapping[str, Mapping[str, float]]) -> str:
    """The way of sharing that is furthest behind training alone, of those that are clearly so.

    It is empty without such a way.
    """
    behind = {name: found["gain"] for name, found in gains.items() if found["high"] < 0}
    return min(behind, key=lambda name: behind[name]) if behind else ""


def changes(
    answers: Mapping[str, Sequence[Answer]], metric: str
) -> dict[str, dict[str, dict[str, float]]]:
    """How a client's personal model differs from the untuned and from the global model.

    Answers are paired, row by row. The two intervals of a client hold together with 95 %.

    Args:
        answers: ``untuned``, ``global`` and ``personal`` -> the answers to all held-out rows.
        metric: a score in [0, 1].

    Returns:
        Client -> ``untuned`` or ``global`` -> ``gain``, ``low``, ``high``, and ``n``, the rows.
    """
    found = {model: by("client", own) for model, own in answers.items()}
    return {
        client: {
            other: _change(rows, found[other][client], metric)
            for other in ("untuned", "global")
            if [a["row"] for a in found[other].get(client, ())] == [a["row"] for a in rows]
        }
        for client, rows in found["personal"].items()
    }


def _change(own: Sequence[Answer], other: Sequence[Answer], metric: str) -> dict[str, float]:
    differences = [a[metric] - b[metric] for a, b in zip(own, other, strict=True)]
    low, high = paired(differences, looks=2)
    return {"gain": mean(differences), "low": low, "high": high, "n": len(own)}

"""95 % intervals of scores, over rows and over clients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

from fedvlm.errors import brief
from fedvlm.metrics import METRICS, number

RIGHT_OR_WRONG = ("exact_match", "reward_accuracy")
"""Scores that count rows: every row is right or wrong."""

FEW_ROWS = 20
"""With fewer scored rows, a client's scores say little."""

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile
RESAMPLES = 2000
MOST_NAMED = 10  # clients in a warning
MOST_RESAMPLED = 1000  # rows; beyond, the bootstrap agrees with its normal limit


def wilson(share: float, rows: int) -> list[float]:
    """The 95 % Wilson score interval of a share of rows (Wilson 1927).

    It also holds for the mean of any score in [0, 1], as no such score varies more than a score
    that is 0 or 1 with the same mean.

    Args:
        share: the share, in [0, 1].
        rows: number of rows, at least 1.

    Returns:
        The low and the high bound, in [0, 1].
    """
    spread = Z**2 / rows
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / rows + spread / (4 * rows)) / (1 + spread)
    # The exact bounds lie in [0, 1] around the share; rounding may miss that near 0 and 1.
    return [min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)]


def from_means(scores: Mapping[str, float]) -> dict[str, list[float]]:
    """Intervals from mean scores and their number of rows alone, for answers that stay elsewhere.

    Args:
        scores: mean scores, and ``examples``, the number of rows, where it is known.

    Returns:
        Metric -> [low, high], for shares of right answers.
    """
    rows = scores.get("examples", 0)
    found = {m: scores[m] for m in RIGHT_OR_WRONG if m in scores}
    return {m: wilson(s, int(rows)) for m, s in found.items() if rows >= 1 and 0 <= s <= 1}


def intervals(answers: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """95 % intervals of the mean scores of :func:`average`, for rows like the scored ones.

    Shares of right answers have Wilson intervals. Other scores have percentile bootstrap intervals
    over 2,000 seeded resamples of the rows; beyond 1,000 rows, their normal limit. Where all rows
    have one value, a bootstrap has no width: a score in [0, 1] then has its Wilson interval, and
    any other score has none.

    Args:
        answers: answers from an engine, as for :func:`average`.

    Returns:
        Metric -> [low, high]. A metric is missing where a row's score is not finite.
    """
    if not answers:
        return {}
    names = [name for name in METRICS if name in answers[0]]
    scores = np.array([[a[name] for name in names] for a in answers], dtype=np.float64)
    weights = np.ones_like(scores)
    if "loss" in names:
        weights[:, names.index("loss")] = [a["weight"] for a in answers]
    finite: Any = np.isfinite(scores).all(0) & np.isfinite(weights).all(0) & (weights > 0).all(0)
    varied: Any = finite & (scores != scores[:1]).any(0)
    varied &= [name not in RIGHT_OR_WRONG for name in names]
    found: dict[str, list[float]] = {}
    bounds = _resampled(scores[:, varied], weights[:, varied])
    rest = iter(bounds.T.tolist())
    for i, name in enumerate(names):
        if varied[i]:
            (low, high), (least, most) = next(rest), METRICS[name].bounds
            found[name] = [max(least, low), min(most, high)]
        elif finite[i] and METRICS[name].share:
            found[name] = wilson(float(scores[:, i].mean()), len(answers))
    return found


def _resampled(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Bounds of weighted means over rows: ``[rows, metrics]`` twice -> ``[2, metrics]``."""
    rows = len(scores)
    if rows <= MOST_RESAMPLED:
        times = _times_drawn(rows).astype(np.float64)  # [resamples, rows]
        means = (times @ (scores * weights)) / (times @ weights)
        means.sort(axis=0)
        return means[[RESAMPLES // 40, RESAMPLES - 1 - RESAMPLES // 40]]
    means = (scores * weights).sum(0) / weights.sum(0)
    errors = (weights * (scores - means) / weights.mean(0)).std(0) / math.sqrt(rows)
    return np.stack([means - Z * errors, means + Z * errors])


@lru_cache(maxsize=64)
def _times_drawn(rows: int) -> np.ndarray:
    """How often each resample holds each row ``[resamples, rows]``, a function of ``rows``."""
    drawn = np.random.default_rng(rows).integers(rows, size=(RESAMPLES, rows))
    drawn += np.arange(RESAMPLES)[:, None] * rows
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * rows).reshape(-1, rows).astype(np.int16)


def mean_interval(
    values: Iterable[float], bounds: tuple[float, float] = (-math.inf, math.inf)
) -> list[float] | None:
    """The 95 % interval of a mean over clients, by Student's t; None for fewer than three clients.

    Args:
        values: one score a client.
        bounds: the lowest and the highest possible score; the interval stays within them.
    """
    scores = np.fromiter(values, dtype=np.float64)
    if len(scores) < 3 or not np.isfinite(scores).all():
        return None
    half = student(len(scores) - 1) * float(scores.std(ddof=1)) / math.sqrt(len(scores))
    low, high = float(scores.mean()) - half, float(scores.mean()) + half
    return [max(bounds[0], low), min(bounds[1], high)]


def paired(differences: Sequence[float], *, looks: int = 1) -> list[float]:
    """The 95 % interval of a mean difference of scores in [0, 1], over rows that two models answer.

    Agresti and Min (2005): two more rows, half a row for each of the four outcomes of two models
    that are right or wrong. So it has a width also where all rows agree. For few rows, Student's t
    takes the place of their normal quantile.

    Args:
        differences: one a row, in [-1, 1]; at least one.
        looks: number of intervals that hold together with 95 % (Bonferroni).

    Returns:
        The low and the high bound, in [-1, 1].
    """
    found = np.asarray(differences, dtype=np.float64)
    if len(found) == 1:
        return [-1.0, 1.0]
    quantile = student(len(found) - 1, -NormalDist().inv_cdf(0.025 / looks))
    rows = len(found) + 2
    mean = float(found.sum()) / rows
    variance = (float((found**2).sum()) + 1) / rows - mean**2
    half = quantile * math.sqrt(variance / rows)
    return [max(-1.0, mean - half), min(1.0, mean + half)]


def gain(
    own: Sequence[float], reference: Sequence[float]
) -> tuple[float | None, list[float] | None]:
    """How much higher the mean of paired scores is, as a share, and its 95 % interval.

    The interval is that of a ratio estimator, with Student's t (Cochran 1977, 6.3).

    Args:
        own: scores, one for each (seed, client).
        reference: the scores of the same seeds and clients.

    Returns:
        The gain, None where the reference is 0; and its [low, high], None for fewer than three
        pairs.
    """
    ours, theirs = (np.asarray(scores, dtype=np.float64) for scores in (own, reference))
    if not theirs.mean() > 0:
        return None, None
    pairs, ratio = len(ours), float(ours.mean() / theirs.mean())
    if pairs < 3:
        return ratio - 1, None
    error = float((ours - ratio * theirs).std(ddof=1)) / math.sqrt(pairs) / float(theirs.mean())
    half = student(pairs - 1) * error
    return ratio - 1, [ratio - 1 - half, ratio - 1 + half]


def student(degrees: int, z: float = Z) -> float:
    """The quantile of Student's t at the level of ``z``, a quantile of the normal distribution.

    To 1 % at the usual level, 97.5 % (Abramowitz and Stegun 1964, 26.7.5).
    """
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**k for k, term in enumerate(terms, 1))


def over_rows(metric: str, clients: Iterable[Mapping[str, float]]) -> float | None:
    """The mean of a score over all clients' rows: a client's score weighs by its scored rows.

    None where a client does not report its number of rows (``examples``).
    """
    found = [(scores[metric], scores.get("examples", 0)) for scores in clients]
    if not found or min(rows for _, rows in found) < 1:
        return None
    return sum(score * rows for score, rows in found) / sum(rows for _, rows in found)


def few_rows(rows: Mapping[str, float], *, named: bool = True) -> str:
    """A warning of the clients with fewer than 20 scored rows; empty without such clients.

    Args:
        rows: client -> its number of scored rows, for the clients that report it.
        named: name the clients.
    """
    few = sorted(((n, client) for client, n in rows.items() if n < FEW_ROWS))
    if not few:
        return ""
    end = ". These scores say little: see their intervals"
    if len(rows) == 1:
        return f"few rows: {few[0][0]:g}, fewer than {FEW_ROWS}{end}"
    names = ", ".join(f"{brief(client, 40)} {n:g}" for n, client in few[:MOST_NAMED])
    more = f" and {len(few) - MOST_NAMED:,} more" if len(few) > MOST_NAMED else ""
    return (
        f"few rows: {len(few):,} of {len(rows):,} clients {'has' if len(few) == 1 else 'have'} "
        f"fewer than {FEW_ROWS} scored rows" + (f" ({names}{more})" if named else "") + end
    )


def ends(
    metrics: Iterable[str], intervals: Mapping[str, Sequence[float]]
) -> dict[str, float | None]:
    """Intervals as columns of a table: ``METRIC_low`` and ``METRIC_high``; None where unknown."""
    found: dict[str, float | None] = {}
    for metric in (m for m in METRICS if m in metrics):
        found[f"{metric}_low"], found[f"{metric}_high"] = intervals.get(metric, (None, None))
    return found


def scored(metric: str, value: float | None, bounds: Sequence[float] | None) -> str:
    """A score with its interval for tables, such as ``86.7 % (70–95)``."""
    score, *interval = scored_parts(metric, value, bounds)
    return f"{score} ({interval[0]})" if interval else score


def scored_parts(
    metric: str, value: float | None, bounds: Sequence[float] | None
) -> tuple[str, ...]:
    """A score and, where it is known, its interval, such as ``86.7 %`` and ``70–95``."""
    if value is None or bounds is None:
        return (number(metric, value),)
    low, high = bounds
    if METRICS[metric].share:
        digits = 0 if high - low >= 0.02 else 1
        shown = [f"{100 * bound:.{digits}f}" for bound in (low, high)]
    else:
        shown = [f"{bound:.{1 if metric == 'length' else 2}f}" for bound in (low, high)]
    return number(metric, value), (" to " if low < 0 else "–").join(shown)

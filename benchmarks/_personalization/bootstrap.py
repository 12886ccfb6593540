"""A paired bootstrap of the difference or ratio of two algorithms (Efron and Tibshirani 1993).

The unit is a pair: one client in one run (seed, client). Both algorithms have a score in each pair,
because a seed gives all algorithms the same clients, rows and initial weights. Each resample draws
as many pairs as there are, with replacement. The interval holds the middle 95 % of the resamples.
The clients of a run are not fully independent: they share the initial adapter and the server.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

RESAMPLES = 10_000
TAIL = 0.025  # share of the resamples outside the interval, at each end

LEAST = 6  # pairs of a claim: six equal signs have a probability of 1/64 by chance, below TAIL

Scores = Mapping[Any, float]  # pair (seed, client) -> score


@dataclass(frozen=True)
class Estimate:
    """An estimate from pairs.

    Attributes:
        value: the difference of the means, or their ratio.
        error: standard error; 0 for a single pair.
        low: low end of the 95 % interval.
        high: high end of the 95 % interval.
        pairs: number of pairs.
    """

    value: float
    error: float
    low: float
    high: float
    pairs: int

    def above(self, limit: float = 0.0) -> bool:
        """Whether the interval lies above a limit. Fewer than :data:`LEAST` pairs show nothing."""
        return self.pairs >= LEAST and self.low > limit


def difference(ours: Scores, theirs: Scores) -> Estimate:
    """Mean of ``ours - theirs`` over the common pairs.

    Raises:
        ValueError: there is no common pair.
    """
    return _difference(*_common(ours, theirs))


def ratio(ours: Scores, theirs: Scores) -> Estimate:
    """Mean of ``ours`` over mean of ``theirs``, over the common pairs.

    A mean of 0 below gives infinity, or NaN where both means are 0. Such resamples of 0 over 0 do
    not count.

    Raises:
        ValueError: there is no common pair.
    """
    one, other = (np.array(values) for values in _common(ours, theirs))
    times = times_drawn(len(one))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _estimate(
            np.divide(one.sum(), other.sum()), (times @ one) / (times @ other), len(one)
        )


def _common(ours: Scores, theirs: Scores) -> tuple[tuple[float, ...], tuple[float, ...]]:
    pairs: Sequence[Hashable] = sorted(ours.keys() & theirs.keys())
    if not pairs:
        raise ValueError("two algorithms without a common pair (seed, client) cannot be compared")
    return tuple(ours[pair] for pair in pairs), tuple(theirs[pair] for pair in pairs)


@lru_cache(maxsize=4096)
def _difference(ours: tuple[float, ...], theirs: tuple[float, ...]) -> Estimate:
    apart = np.array(ours) - np.array(theirs)
    return _estimate(apart.mean(), times_drawn(len(apart)) @ apart / len(apart), len(apart))


def _estimate(value: float, resampled: np.ndarray, pairs: int) -> Estimate:
    counted = np.sort(resampled[~np.isnan(resampled)])
    if not len(counted):
        return Estimate(float(value), math.nan, math.nan, math.nan, pairs)
    # No interpolation: between two infinite resamples it would give NaN.
    cut = round(TAIL * (len(counted) - 1))
    error = float(counted.std()) if np.isfinite(counted).all() else math.inf
    return Estimate(float(value), error, float(counted[cut]), float(counted[-1 - cut]), pairs)


@lru_cache(maxsize=64)
def times_drawn(pairs: int) -> np.ndarray:
    """How often each resample holds each pair ``[resamples, pairs]``, a function of the number."""
    drawn = np.random.default_rng(pairs).integers(pairs, size=(RESAMPLES, pairs))
    times = np.zeros((RESAMPLES, pairs))
    np.add.at(times, (np.arange(RESAMPLES)[:, None], drawn), 1.0)
    return times

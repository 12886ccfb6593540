"""The statistics of a privacy audit: a lower bound of epsilon from one run, AUC, TPR at low FPR.

The audit is that of Steinke, Nasr and Jagielski, arXiv 2305.08846. Before training, a fair coin
puts each canary in or out. After training, an attacker scores each canary, guesses "in" for the
highest scores and "out" for the lowest, and abstains in between. Under (epsilon, delta)-DP, the
number of right guesses is at most that of a coin with ``p = e^epsilon / (1 + e^epsilon)``, up to a
correction for delta (their theorem 5.2). The lower bound is the smallest epsilon that the number of
right guesses does not contradict.

Their theorem asks for a number of guesses that is fixed in advance. :data:`SHARES` fixes a few
numbers, and each is tested at an equal part of the error (Bonferroni). So the largest of their
bounds holds at the full confidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedvlm.errors import FedVLMError

CONFIDENCE = 0.95
SHARES = (0.05, 0.1, 0.2, 0.4)
"""Guesses at each end of the order of scores, as shares of the canaries."""
LOW_RATE = 0.01  # false positives, for the true positive rate that is reported
LARGEST = 60.0  # no bound is above it: the probabilities are 1 in double precision


@dataclass(frozen=True)
class Guesses:
    """The guesses of one attacker, and what they prove.

    Attributes:
        guesses: the number of guesses, of both kinds.
        right: the number of right guesses.
        epsilon: the lower bound of epsilon.
    """

    guesses: int
    right: int
    epsilon: float


@dataclass(frozen=True)
class Finding:
    """The audit of one view.

    Attributes:
        canaries: the number of canaries.
        trained: the number of canaries that were trained on.
        best: the guesses with the largest bound.
        tried: all guesses, one for each of :data:`SHARES`.
        auc: probability that a canary that was in scores higher than one that was out.
        tpr: the share of "in" that is found while at most 1 % of "out" is taken for "in".
    """

    canaries: int
    trained: int
    best: Guesses
    tried: tuple[Guesses, ...]
    auc: float
    tpr: float


def read(found: Mapping[str, Any]) -> Finding:
    """The finding of which :func:`dataclasses.asdict` made a tree of plain values."""
    tried = tuple(Guesses(**one) for one in found["tried"])
    return Finding(**{**found, "best": Guesses(**found["best"]), "tried": tried})


def find(
    scores: Sequence[float] | np.ndarray,
    trained: Sequence[bool],
    delta: float = 0.0,
    level: float = CONFIDENCE,
) -> Finding:
    """Audits one view.

    Args:
        scores: a canary's score; higher speaks for "in".
        trained: whether the canary was in.
        delta: of the guarantee that is tested.
        level: the confidence of the bound.

    Raises:
        FedVLMError: a score is not finite, or there are fewer than two canaries.
    """
    found, inside = np.asarray(scores, float), np.asarray(trained, bool)
    if len(found) < 2:
        raise FedVLMError(f"an audit needs two canaries or more, got {len(found)}")
    if not np.isfinite(found).all():
        odd = found[~np.isfinite(found)][0]
        raise FedVLMError(f"the loss of a canary is {odd}; the run has diverged")
    order, error = np.argsort(found, kind="stable"), (1 - level) / len(SHARES)
    tried = []
    for share in SHARES:
        count = max(1, int(share * len(found)))  # at each end
        right = int(inside[order[-count:]].sum() + (~inside[order[:count]]).sum())
        bound = lower_bound(right, 2 * count, len(found), delta, 1 - error)
        tried.append(Guesses(2 * count, right, bound))
    best = max(tried, key=lambda one: (one.epsilon, one.guesses))
    rates = area(found, inside), found_at(found, inside)
    return Finding(len(found), int(inside.sum()), best, tuple(tried), *rates)


def scores(base: Sequence[float], losses: Sequence[float]) -> np.ndarray:
    """The attacker's scores: the loss that the base model leads to expect, minus the loss.

    The expected loss is the least-squares line through all canaries' losses, in and out: it needs
    no coin. Where training changes little, the line is nearly the base model's loss, and the score
    is the fall of the loss. Where a model has learnt its rows by heart, the base model's loss says
    little, and the line is flat.

    Args:
        base: the canaries' losses on the base model.
        losses: their losses on the view.
    """
    before, after = np.asarray(base, float), np.asarray(losses, float)
    centred = before - before.mean()
    spread = float(centred @ centred)
    slope = float(centred @ after) / spread if spread else 0.0
    return after.mean() + slope * centred - after


def lower_bound(
    right: int, guesses: int, canaries: int, delta: float = 0.0, level: float = CONFIDENCE
) -> float:
    """The largest epsilon that a number of right guesses excludes; 0 where there is none.

    Args:
        right: the number of right guesses.
        guesses: the number of guesses, fixed in advance.
        canaries: the number of canaries, guessed or not.
        delta: of the guarantee.
        level: the confidence.
    """
    low, high = 0.0, LARGEST
    if chance(right, guesses, canaries, low, delta) > 1 - level:
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if chance(right, guesses, canaries, middle, delta) > 1 - level:
            high = middle
        else:
            low = middle
    return low


def chance(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """The largest probability of so many right guesses, or more, under (epsilon, delta)-DP.

    It rises with ``epsilon``.
    """
    coin, p = _binomial(), 1 / (1 + math.exp(-epsilon))
    tail = float(coin.sf(right - 1, guesses, p))
    if not delta or not right:
        return min(1.0, tail)
    # P[right > W >= right - i] / i, for i = 1, 2, ... up to right
    below = np.cumsum(coin.pmf(np.arange(right - 1, -1, -1), guesses, p))
    slope = float((below / np.arange(1, right + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * slope)


def area(scores: np.ndarray, trained: np.ndarray) -> float:
    """The area under the ROC curve; a tie counts one half. 0.5 where all are in, or all out."""
    inside, outside = scores[trained], np.sort(scores[~trained])
    if not len(inside) or not len(outside):
        return 0.5
    below = np.searchsorted(outside, inside, "left")
    ties = np.searchsorted(outside, inside, "right") - below
    return float((below + ties / 2).mean() / len(outside))


def found_at(scores: np.ndarray, trained: np.ndarray, rate: float = LOW_RATE) -> float:
    """The true positive rate of the best threshold whose false positive rate is at most ``rate``.

    With fewer than ``1 / rate`` canaries out, no canary that was out may pass.
    """
    outside = np.sort(scores[~trained])[::-1]
    allowed = int(rate * len(outside))
    if not trained.any() or not len(outside):
        return 0.0
    return float((scores[trained] > outside[allowed]).mean())


def _binomial() -> Any:
    """The binomial distribution of scipy.

    Raises:
        FedVLMError: scipy is not installed.
    """
    try:
        from scipy.stats import binom
    except ImportError as error:
        raise FedVLMError(
            "an audit needs an extra package, scipy: pip install 'fedvlm[privacy]'"
        ) from error
    return binom

"""The accountant: epsilon of noisy steps on Poisson samples, and the noise for a budget.

A step takes each unit with probability ``rate``, clips the norm of each unit's contribution to
``C``, sums, and adds Gaussian noise of standard deviation ``noise * C``. Neighbouring data sets
differ by one unit that is added or removed. Composition is by privacy loss distributions (PLD,
Koskela et al., arXiv 1906.03049) in Google's ``dp-accounting``, with connect-the-dots and
pessimistic rounding: the epsilon is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from fedvlm.errors import ConfigError

ACCOUNTANT = "PLD (dp-accounting), Poisson sampling, add or remove one unit"
INTERVAL = 1e-3  # of the discretized privacy loss: epsilon is right to about 1e-4 of its value
CLOSE = 1e-4  # relative accuracy of the noise for a budget
SMALLEST, LARGEST = -3.0, 16.0  # logarithms of the noises that are tried


@dataclass(frozen=True)
class Spend:
    """Equal steps of one mechanism.

    Attributes:
        rate: probability that a step takes a unit, in (0, 1].
        noise: standard deviation of the noise over the clipping norm.
        steps: number of steps.
    """

    rate: float
    noise: float
    steps: int


def check_installed() -> None:
    """Refuses privacy settings where the accountant's library is missing.

    Raises:
        ConfigError: ``dp-accounting`` is not installed.
    """
    if find_spec("dp_accounting") is None:
        raise ConfigError(
            ["privacy: the accountant needs an extra package: pip install 'fedvlm[privacy]'"]
        )


def epsilon(spends: Iterable[Spend], delta: float) -> float:
    """The epsilon at ``delta`` of all spends together; 0 without a step.

    Args:
        spends: steps on the same units.
        delta: in (0, 1).
    """
    joined: dict[tuple[float, float], int] = {}
    for spend in spends:
        key = spend.rate, spend.noise
        joined[key] = joined.get(key, 0) + spend.steps
    return _epsilon(tuple(sorted((*key, n) for key, n in joined.items() if n)), delta)


@lru_cache(maxsize=4096)
def _epsilon(spends: tuple[tuple[float, float, int], ...], delta: float) -> float:
    whole = None
    for rate, noise, steps in spends:
        part = _loss(rate, noise).self_compose(steps)
        whole = part if whole is None else whole.compose(part)
    return 0.0 if whole is None else float(whole.get_epsilon_for_delta(delta))


@lru_cache(maxsize=256)
def _loss(rate: float, noise: float) -> Any:
    """The privacy loss distribution of one step."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=INTERVAL
    )


def noise_for(rate: float, steps: int, budget: float, delta: float) -> float:
    """The smallest noise with which ``steps`` steps keep a budget, to a relative 1e-4.

    Args:
        rate: probability that a step takes a unit.
        steps: number of steps, at least 1.
        budget: epsilon.
        delta: in (0, 1).

    Raises:
        ConfigError: no noise is enough.
    """
    return _noise_for(float(rate), steps, float(budget), float(delta))


@lru_cache(maxsize=1024)
def _noise_for(rate: float, steps: int, budget: float, delta: float) -> float:
    from scipy.optimize import brentq

    def over(logarithm: float) -> float:
        """How far the noise ``exp(logarithm)`` is over the budget; nearly linear."""
        found = _epsilon(((rate, math.exp(logarithm), steps),), delta)
        return math.log(max(found, 1e-300)) - math.log(budget)

    low = high = 0.0
    while over(high) > 0:
        low, high = high, high + 1
        if high > LARGEST:
            raise ConfigError(
                [
                    f"privacy.epsilon={budget:g} with privacy.delta={delta:g} cannot be kept over "
                    f"{steps} steps: raise it, or train fewer rounds"
                ]
            )
    while over(low) <= 0:
        high, low = low, low - 0.5
        if low < SMALLEST:
            return math.exp(SMALLEST)
    found = brentq(over, low, high, xtol=CLOSE / 2)
    while over(found) > 0:
        found += CLOSE / 2
    return math.exp(found)

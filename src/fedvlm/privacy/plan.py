"""The plan of differential privacy for one client: samples, noise, and the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedvlm.errors import ConfigError
from fedvlm.privacy import accountant
from fedvlm.privacy.accountant import Spend
from fedvlm.settings.privacy import PrivacyConfig

FEWEST = 2  # units of a client


class Unplanned(ConfigError):
    """The number of a client's units allows no plan. The message has this number."""


@dataclass(frozen=True)
class Plan:
    """Differential privacy of one client, or of all clients together (``unit=client``).

    Attributes:
        units: the number of units.
        batch: the expected number of units in a step.
        noise: standard deviation of the noise over ``clip``.
        clip: the largest norm of a unit's contribution.
        delta: of the guarantee.
        budget: the largest epsilon.
    """

    units: int
    batch: float
    noise: float
    clip: float
    delta: float
    budget: float

    @property
    def rate(self) -> float:
        """The probability that a step takes a unit."""
        return self.batch / self.units

    def epsilon(self, steps: int) -> float:
        """The epsilon after ``steps`` steps."""
        return accountant.epsilon([self.spend(steps)], self.delta)

    def spend(self, steps: int) -> Spend:
        """``steps`` steps of this plan."""
        return Spend(self.rate, self.noise, steps)

    def fits(self, steps: int) -> bool:
        """Whether ``steps`` steps keep the budget."""
        return self.epsilon(steps) <= self.budget

    def loudness(self, floats: int) -> float:
        """The norm of a step's noise over the largest norm of its signal.

        Args:
            floats: the number of trained floats.
        """
        return self.noise * math.sqrt(floats) / self.batch


def planned(settings: PrivacyConfig, units: int, batch: int, steps: int, client: str = "") -> Plan:
    """The plan of a client.

    Args:
        settings: with a unit.
        units: the number of the client's units.
        batch: the expected number of units in a step; all units where there are fewer.
        steps: the number of noisy steps of the whole run.
        client: its name, for messages.

    Raises:
        Unplanned: there are too few units, or delta is too large for their number.
        ConfigError: the budget cannot be kept.
    """
    assert settings.epsilon is not None
    assert settings.delta is not None
    of = f" of client '{client}'" if client else ""
    if units < FEWEST:
        raise Unplanned([f"privacy.unit={settings.unit}: the rows{of} hold {units} unit"])
    if settings.delta * units >= 1:
        raise Unplanned(
            [
                f"privacy.delta={settings.delta:g} must be below 1 / number of units, and the rows"
                f"{of} hold {units} units: set privacy.delta={0.1 / units:.1g} or less"
            ]
        )
    taken = min(batch, units)
    noise = settings.noise or accountant.noise_for(
        taken / units, max(1, steps), settings.epsilon, settings.delta
    )
    return Plan(units, taken, noise, settings.clip, settings.delta, settings.epsilon)

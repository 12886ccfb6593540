"""The account of one run under differential privacy at a site: its budget, and the site's limit.

The epsilon of all runs is that of their composition at one delta, the site's ``delta_max``. So the
deltas of the runs make no difference to it. Messages go to the server. An exact epsilon would tell
it the number of units, so a message has two digits, rounded up, and the site's log has all.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from fedvlm.deploy.limits import Refused, Spent
from fedvlm.deploy.protection import Protection
from fedvlm.deploy.spending import Charge, Claim, Marks, Spending, named, spent
from fedvlm.errors import FedVLMError
from fedvlm.privacy.plan import Plan
from fedvlm.settings.privacy import PrivacyConfig

logger = logging.getLogger("fedvlm")


class Account:
    """What a run may still spend at a site. The ledger on the disk decides, never this object.

    Args:
        state: the folder of the site's state.
        run: the number of the run.
        plan: samples, noise and budget of the run at this site.
        steps: round -> its number of noisy steps, for all rounds.
        policy: the site's demands.
    """

    def __init__(
        self, state: Path, run: str, plan: Plan, steps: Mapping[int, int], policy: Protection
    ):
        self.spending = Spending(state)
        self.run, self.plan, self.steps, self.policy = run, plan, dict(steps), policy
        self.claim: Claim
        self.marks: Marks = frozenset()
        self._own = Limit(plan.budget, plan.delta)
        self._all = Limit(policy.epsilon_max, policy.delta_max)

    def open(self, privacy: PrivacyConfig, rows: Any, chosen: np.ndarray) -> None:
        """Notes the run in the ledger, before round 1.

        Args:
            privacy: the run's section ``privacy`` as it holds at this site.
            rows: the site's rows.
            chosen: positions of the training rows.

        Raises:
            Refused: the whole run would spend more than the rows have left.
            FedVLMError: the ledger is damaged, or cannot be written.
        """
        plan, unit = self.plan, named(privacy.unit)
        with self.spending.locked():
            self.marks = self.spending.marks(rows, chosen, privacy.column)
            name = self.spending.keep(self.marks)
            costliest = plan.spend(max(self.steps.values(), default=0))
            self.claim = Claim(self.run, name, unit, costliest, plan.delta, plan.budget)
            own, others = self._parted()
            if not own:
                self._check_whole(others)
            self._check_units(own)
            self.spending.begin(self.claim)
            logger.info(
                "differential privacy: unit '%s', %d units, noise %.4g, epsilon %.4g at delta %g; "
                "spent by this run so far: %.4g",
                *(unit, plan.units, plan.noise, plan.budget, plan.delta),
                spent(own, plan.delta),
            )

    def spend(self, round_: int, down: str) -> None:
        """Charges a round that is about to be trained, however often it was trained before.

        Args:
            round_: the round.
            down: the digest of its download.

        Raises:
            Spent: the round would exceed the run's budget, or the site's limit.
            Refused: the rows have another unit by now.
            FedVLMError: the ledger is damaged, or cannot be written.
        """
        new = self.plan.spend(self.steps.get(round_, 0))
        if not new.steps:
            return
        with self.spending.locked():
            own, others = self._parted()
            charge = Charge(self.claim, round_, new)
            if after := self._own.exceeded([*own, charge]):
                raise _refused(
                    f"round {round_} would make the epsilon of this run {{}} at delta "
                    f"{self.plan.delta:g}, and its budget is {self.plan.budget:g} "
                    "(privacy.epsilon): rounds that were trained again are spent again",
                    after,
                    kind=Spent,
                )
            self._check_round(charge, own, others)
            self.spending.charge(self.claim, round_, down, new)

    def check_trained(self, round_: int, steps: int) -> None:
        """Stops a reply that took more steps than were charged, before it is kept or sent.

        Args:
            round_: the round.
            steps: the steps that were trained.

        Raises:
            FedVLMError: the algorithm trains more than its rehearsal has shown.
        """
        planned = self.steps.get(round_, 0)
        if steps > planned:
            raise FedVLMError(
                f"round {round_} trained {steps} steps, and {planned} were planned and charged: "
                "the algorithm lets its steps depend on what a client keeps or receives, and "
                "differential privacy cannot account for that. The reply stays here"
            )

    def _parted(self) -> tuple[list[Charge], list[Charge]]:
        """The charges of this run, and those of other runs that meet it."""
        charges = self.spending.charges()
        own = [charge for charge in charges if charge.claim.run == self.run]
        others = [charge for charge in charges if charge.claim.run != self.run]
        return own, self.spending.meeting(self.marks, others)

    def _check_whole(self, others: list[Charge]) -> None:
        """Refuses a run that has not begun if the rows have too little left for it."""
        whole = Charge(self.claim, 0, self.plan.spend(self._affordable()))
        if self.policy.epsilon_max is None:
            return
        self._check_units(others)
        if after := self._all.exceeded([*others, whole]):
            before, alone = (spent(c, self._all.delta) for c in (others, [whole]))
            raise _refused(
                "the site's policy refuses this run: its rows have spent epsilon {}, this run "
                f"would spend {{}}, together {{}} at delta {self._all.delta:g}, and the limit is "
                f"{self._all.most:g} (epsilon_max)",
                *(before, alone, after),
            )

    def _affordable(self) -> int:
        """The steps of all rounds that keep the run's own budget.

        Raises:
            Refused: not even the first round does.
        """
        sums = [n for n in accumulate(self.steps[round_] for round_ in sorted(self.steps)) if n]
        if not sums or self.plan.fits(sums[-1]):
            return sums[-1] if sums else 0
        count = bisect_left(sums, True, key=lambda steps: not self.plan.fits(steps))
        if not count:
            raise _refused(
                f"the first round alone would spend epsilon {{}} at delta {self.plan.delta:g}, and "
                f"the budget is {self.plan.budget:g} (privacy.epsilon): raise privacy.noise",
                self.plan.epsilon(sums[0]),
            )
        return sums[count - 1]

    def _check_units(self, charges: list[Charge]) -> None:
        """Refuses a sum over different units, such as a row and a patient: it has no meaning."""
        other = sorted({charge.claim.unit for charge in charges} - {self.claim.unit})
        if other:
            logger.error("these rows were spent by the unit %s, not '%s'", other, self.claim.unit)
            raise Refused(
                "the site's policy refuses this run: its rows were spent by another unit "
                "(privacy.unit, dp_unit), and epsilons of different units do not add up; the "
                "site's log names both"
            )

    def _check_round(self, charge: Charge, own: list[Charge], others: list[Charge]) -> None:
        """Refuses a round after which the rows would have spent more than the site's limit."""
        if self.policy.epsilon_max is None:
            return
        self._check_units(others)
        if after := self._all.exceeded([*own, *others, charge]):
            raise _refused(
                f"the site's policy refuses round {charge.round}: it would make the epsilon of all "
                f"runs on its rows {{}} at delta {self._all.delta:g}, and the limit is "
                f"{self._all.most:g} (epsilon_max)",
                after,
                kind=Spent,
            )


class Limit:
    """A limit on the epsilon of charges. It remembers the last sum that kept the limit.

    A sum with no more steps of any kind keeps the limit too, and is not computed: that would take
    seconds in each round of a site with many runs.

    Args:
        most: the largest epsilon; None: there is no limit.
        delta: of this epsilon.
    """

    def __init__(self, most: float | None, delta: float | None):
        self.most, self.delta = most or math.inf, delta or 0.0
        self._kept: Counter[tuple[float, float]] = Counter()

    def exceeded(self, charges: Sequence[Charge]) -> float | None:
        """The epsilon of some charges if it is above the limit, else None."""
        steps: Counter[tuple[float, float]] = Counter()
        for charge in charges:
            steps[charge.spend.rate, charge.spend.noise] += charge.spend.steps
        if steps <= self._kept:
            return None
        total = spent(charges, self.delta)
        if total > self.most:
            return total
        self._kept = steps
        return None


def _refused(text: str, *numbers: float, kind: type[Refused] = Refused) -> Refused:
    """A refusal for the server, with coarse numbers; the site's log gets the exact ones."""
    logger.warning("refused: %s", text.format(*(f"{number:.6g}" for number in numbers)))
    return kind(text.format(*(f"{_up(number):g}" for number in numbers)))


def _up(value: float) -> float:
    """A number rounded up to two digits."""
    if not 0 < value < math.inf:
        return value
    scale = 10.0 ** (1 - math.floor(math.log10(value)))
    return math.ceil(round(value * scale, 6)) / scale

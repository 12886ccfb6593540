"""What the runs at a site have spent of its privacy, in words for a person at the site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedvlm.deploy.protection import Protection
from fedvlm.deploy.spending import Charge, Claim, Spending, spent
from fedvlm.errors import counted

MIXED = "the runs protect different units, so no epsilon holds for all of them"


@dataclass(frozen=True)
class Balance:
    """What was spent on one set of rows.

    Attributes:
        runs: the runs on exactly these rows, and then those that meet them.
        units: the protected units of all these runs; an epsilon holds only where there is one.
        trained: the number of rounds that were charged.
        epsilon: of all these runs together; None where there are several units.
        delta: of this epsilon.
    """

    runs: tuple[str, ...]
    units: tuple[str, ...]
    trained: int
    epsilon: float | None
    delta: float


def balances(state: str | Path, delta: float | None = None) -> list[Balance]:
    """What was spent on each set of rows of a site, the oldest set first.

    Args:
        state: the folder of the site's state.
        delta: of the epsilons; None: the smallest delta of the runs.

    Raises:
        FedVLMError: the ledger is damaged.
    """
    spending = Spending(state)
    if not spending.begun:
        return []
    with spending.locked():
        claims, charges = spending.claims(), spending.charges()
        sets = dict.fromkeys(claim.rows for claim in claims)
        return [
            _balance(
                [claim for claim in claims if claim.rows == name],
                spending.meeting(spending.kept(name), charges),
                delta,
            )
            for name in sets
        ]


def _balance(own: Sequence[Claim], charges: Sequence[Charge], delta: float | None) -> Balance:
    claims = [*own, *(charge.claim for charge in charges)]
    units = tuple(dict.fromkeys(claim.unit for claim in claims))
    least = min(claim.delta for claim in claims) if delta is None else delta
    total = spent(charges, least) if len(units) == 1 else None
    return Balance(tuple(dict.fromkeys(c.run for c in claims)), units, len(charges), total, least)


def listed(state: str | Path, policy: Protection) -> Iterator[str]:
    """The lines of ``fedvlm site budget``."""
    yield limit(policy)
    found = balances(state, policy.delta_max)
    if not found:
        yield "no run under differential privacy has begun at this site"
    for one in found:
        trained = counted(one.trained, "round")
        yield f"rows of run {one.runs[0]}: unit '{', '.join(one.units)}', {trained}"
        if also := one.runs[1:]:
            yield f"  some of these rows, or of their units, are also of run {', '.join(also)}"
        yield f"  {_sum(one, policy)}"


def limit(policy: Protection) -> str:
    """The site's demands, as a sentence."""
    if policy.epsilon_max is not None:
        text = (
            f"at most epsilon {policy.epsilon_max:g} at delta {policy.delta_max:g} over all runs "
            "on the same rows"
        )
    elif policy.delta_max is not None:
        text = f"at most delta {policy.delta_max:g} in a run, and no limit on epsilon"
    else:
        text = "required, without a limit" if policy.dp_required else "not required"
    unit = f"; the unit is '{policy.dp_unit}'" if policy.dp_unit else ""
    return f"differential privacy: {text}{unit}"


def most(state: str | Path, policy: Protection) -> str:
    """The largest sum at a site, before it is known which rows a run would use."""
    found = balances(state, policy.delta_max)
    if not found:
        return "spent at this site so far: nothing"
    if any(one.epsilon is None for one in found):
        return f"spent at this site so far: {MIXED}"
    largest = max(found, key=lambda one: one.epsilon or 0.0)
    return f"spent at this site so far, on any of its rows: at most {_sum(largest, policy)}"


def on(
    state: str | Path, policy: Protection, rows: Any, chosen: np.ndarray, column: str | None
) -> str:
    """What was spent on some rows.

    Args:
        state: the folder of the site's state.
        policy: the site's demands.
        rows: from :func:`fedvlm.data.sources.load_rows`.
        chosen: positions of the training rows.
        column: rows with equal values in it are one unit; None: every row is one.
    """
    spending = Spending(state)
    charges: list[Charge] = []
    if spending.begun:
        with spending.locked():
            marks = spending.marks(rows, chosen, column)
            charges = spending.meeting(marks, spending.charges())
    if not charges:
        return "spent on these rows so far: nothing"
    return f"spent on these rows so far: {_sum(_balance([], charges, policy.delta_max), policy)}"


def _sum(one: Balance, policy: Protection) -> str:
    if one.epsilon is None:
        return MIXED
    text = f"epsilon {one.epsilon:.4g} at delta {one.delta:g}"
    if policy.epsilon_max is None:
        return text
    return f"{text}, and {max(0.0, policy.epsilon_max - one.epsilon):.4g} is left"

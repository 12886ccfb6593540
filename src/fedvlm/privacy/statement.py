"""The guarantee of a run in words: what it covers, under which assumptions, and what it does not.

Every number comes from ``privacy.json`` in the folder of the run, so that anyone can compute it
again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LOUD = 10.0
"""Ratio of noise to signal above which a model hardly learns."""


def guarantee(about: Mapping[str, Any], epsilon: float | None = None) -> str:
    """The guarantee in one sentence.

    Args:
        about: the content of ``privacy.json``.
        epsilon: the epsilon that was spent; None: the budget.
    """
    spent = about["epsilon"] if epsilon is None else epsilon
    whole = unit(about["unit"])
    return (
        f"epsilon {spent:.4g} at delta {about['delta']:g}; unit: {whole}, {about['adjacency']}; "
        f"accountant: {about['accountant']}"
    )


def unit(name: str) -> str:
    """The protected unit in words."""
    known = {"row": "one row of a client", "client": "all rows of one client"}
    return known.get(name, f"all rows of a client with one value of '{name}'")


def mechanism(about: Mapping[str, Any]) -> str:
    """Samples and noise in one sentence."""
    plans = about["clients"].values()
    noises = sorted(plan["noise"] for plan in plans)
    batches = sorted(plan["expected_batch"] for plan in plans)
    what = "clients' changes" if about["unit"] == "client" else "gradients of units"
    return (
        f"{what} clipped to norm {about['clip']:g}, noise {_spread(noises)} times this norm, "
        f"{_spread(batches)} units expected in a step, noise to signal "
        f"{about['noise_to_signal']:.3g}"
    )


def not_covered(about: Mapping[str, Any]) -> list[str]:
    """The limits of the guarantee, one sentence each."""
    limits = [
        "The run was a simulation in one process, so the guarantee is simulated: it holds for what "
        "the clients would send, and the process itself read all rows.",
        "Scores, losses and answers in the run's folder have no noise. They are measurements, not "
        "for release.",
        "Every further run on the same rows adds to epsilon, as do the runs of a comparison and a "
        "search for settings.",
        "The held-out rows are scored and never trained on; the guarantee does not cover them.",
    ]
    if about["unit"] == "client":
        limits.insert(
            1,
            "Personal models have no noise: they must stay with their clients. The global model "
            "and everything that the server sends are covered.",
        )
    else:
        limits.insert(
            1, "A unit is protected at its client. Rows of the same person elsewhere add up."
        )
    return limits


def loud(about: Mapping[str, Any]) -> str:
    """A warning where the noise drowns the signal; else empty."""
    ratio = about["noise_to_signal"]
    if ratio <= LOUD:
        return ""
    return (
        f"the noise of a step is up to {ratio:.3g} times its signal: the model will hardly learn; "
        "raise train.batch_size or privacy.epsilon, or train fewer weights (lora.rank, lora.target)"
    )


def _spread(values: list[float]) -> str:
    low, high = f"{values[0]:.4g}", f"{values[-1]:.4g}"
    return low if low == high else f"{low} to {high}"

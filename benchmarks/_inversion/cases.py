"""The measured cases, and the budget behind the noise."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from _inversion.uploads import Case
from fedvlm.privacy import accountant

ROWS, BATCH, STEPS, DELTA = 500, 32, 400, 1e-4  # of the site for which the noise is computed
BUDGETS = (8.0, 3.0)  # epsilons
DRAWS = 5  # draws of the noise in a line-up

Noises = Mapping[float, float]
"""Epsilon -> standard deviation of the noise over the clipping norm."""


def noises() -> Noises:
    """The noise of each budget; empty where the accountant's library is missing."""
    if find_spec("dp_accounting") is None:
        return {}
    return {e: accountant.noise_for(BATCH / ROWS, STEPS, e, DELTA) for e in BUDGETS}


def protections(noise: Noises) -> dict[str, dict[str, object]]:
    """Name -> settings of a case."""
    return {
        "int8": {"compress": "int8"},
        "topk 10 %": {"compress": "topk"},
        "clipped": {"noise": 0.0},
        **{f"epsilon {e:g}": {"noise": n} for e, n in noise.items()},
    }


def protection(case: Case, noise: Noises) -> str:
    """The name of a case's protection; ``none`` without one."""
    if case.noise:
        return next(f"epsilon {e:g}" for e, n in noise.items() if n == case.noise)
    if case.noise == 0.0:
        return "clipped"
    return {"none": "none", "int8": "int8", "topk": "topk 10 %"}[case.compress]


def of_tokens(noise: Noises, large: bool) -> list[Case]:
    """The cases of the attack on tokens.

    Args:
        noise: of the budgets.
        large: whether the model is large: fewer cases.
    """
    if large:
        plain = [
            Case("plora"),
            Case("plora", rank=64),
            Case("lora", steps=5),
            Case("lora", "adamw", steps=5),
        ]
        return plain + [
            Case("plora", rank=rank, noise=n) for n in noise.values() for rank in (8, 64)
        ]
    first = [
        Case("plora", optimizer, 1, rows) for optimizer in ("sgd", "adamw") for rows in (1, 2, 4)
    ]
    five = [
        Case(name, optimizer, 5, rows)
        for name, optimizer, rows in (
            ("lora", "sgd", 1),
            ("lora", "sgd", 2),
            ("lora", "sgd", 4),
            ("lora", "adamw", 1),
            ("plora", "sgd", 1),
            ("plora", "adamw", 1),
            ("ffa", "sgd", 1),
            ("ffa", "adamw", 1),
        )
    ]
    later = [Case(name, "adamw", 5, round=6) for name in ("lora", "plora", "ffa")]
    ranks = [
        Case("lora", "sgd", 5, rank=16),
        Case("plora", "sgd", 1, rank=64),
        Case("plora", "sgd", 1, 4, rank=64),
        Case("plora", "adamw", 5, rank=64),
    ]
    guarded = [
        Case("plora", rank=rank, **settings)  # type: ignore[arg-type]
        for rank in (8, 64)
        for settings in protections(noise).values()
    ]
    return first + five + later + ranks + guarded


def of_lineup(noise: Noises) -> list[Case]:
    """The cases of the line-up, in the first round of ``plora``. All begin with the same model."""
    plain = [Case("plora", optimizer, steps) for optimizer in ("sgd", "adamw") for steps in (1, 5)]
    together = [Case("plora", "adamw", 1, rows) for rows in (2, 4, 20)]
    guarded = [Case("plora", **settings) for settings in protections(noise).values()]  # type: ignore[arg-type]
    deeper = [Case("plora", "adamw", 5, noise=n) for n in noise.values()]
    crowd = [Case("plora", "adamw", 1, 20, noise=n) for n in noise.values()]
    return plain + together + guarded + deeper + crowd


def of_later_rounds() -> list[Case]:
    """The cases of the line-up in a later round: each begins with another model."""
    return [Case(name, "adamw", 5, round=6) for name in ("lora", "plora", "ffa")]


def of_search(noise: Noises) -> dict[str, Case]:
    """Title -> case of the search for pictures or features."""
    return {
        "without protection": Case("plora"),
        "AdamW": Case("plora", "adamw"),
        "clipped": Case("plora", noise=0.0),
        **{f"epsilon {e:g}": Case("plora", noise=n) for e, n in noise.items()},
    }

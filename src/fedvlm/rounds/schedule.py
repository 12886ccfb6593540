"""The rounds of a run: who takes part, and with which algorithm; a function of the config alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedvlm.algorithms.table import TABLE, Algorithm
from fedvlm.seeds import derive
from fedvlm.settings.sections import Config


@dataclass(frozen=True)
class Round:
    """One round's plan, a function of the config alone.

    Attributes:
        number: from 1; the one after ``train.rounds`` is local tuning at the end.
        cohort: the clients that take part.
        algorithm: what they run.
        evaluate: whether clients are scored after it.
    """

    number: int
    cohort: tuple[str, ...]
    algorithm: Algorithm
    evaluate: bool


def plan(config: Config, algorithm: Algorithm, clients: Sequence[str]) -> Iterator[Round]:
    """All rounds of a run. The cohort is drawn from (seed, round)."""
    rounds, size = config.train.rounds, config.train.clients_per_round or len(clients)
    size = 1 if TABLE[config.algorithm.name].pools else size
    for number in range(1, rounds + 1):
        draw = np.random.default_rng(derive(config.seed, number, "cohort"))
        chosen = sorted(draw.choice(len(clients), size=min(size, len(clients)), replace=False))
        due = config.eval.every and number % config.eval.every == 0
        cohort = tuple(clients[i] for i in chosen)
        now = of_round(config, algorithm, number)
        yield Round(number, cohort, now, bool(due or number == rounds))
    if algorithm.final:
        last = rounds + 1
        yield Round(last, tuple(clients), of_round(config, algorithm, last), True)


def of_round(config: Config, algorithm: Algorithm, number: int) -> Algorithm:
    """The algorithm of a round; 0: the run's own."""
    last = algorithm.final if number > config.train.rounds else None
    return last or (algorithm.at(number) if number else algorithm)

"""The rounds of a run and the cohort of each: a function of the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedvlm.algorithms.base import Algorithm, Visit
from fedvlm.algorithms.table import find
from fedvlm.seeds import derive
from fedvlm.settings.sections import Config


@dataclass(frozen=True)
class Round:
    """The plan of one round.

    Attributes:
        number: from 1. The round after ``train.rounds`` is the final round; 0 stands for the time
            before the first round.
        cohort: the clients that take part.
        evaluate: whether clients are scored after the round.
        final: whether this is the final round of all clients, without uploads.
    """

    number: int
    cohort: tuple[str, ...] = ()
    evaluate: bool = True
    final: bool = False

    def visit(self, client: str, weight: float = 1.0, sampled: float = 1.0) -> Visit:
        """A client in this round."""
        return Visit(client, weight, sampled, self.number, self.final)

    def visits(self, weights: Mapping[str, float]) -> dict[str, Visit]:
        """The visits of the cohort, known at both ends of the wire.

        Args:
            weights: client -> the number of its training examples, for all clients.
        """
        sampled = sum(weights[c] for c in self.cohort) / sum(weights.values())
        return {c: self.visit(c, weights[c], sampled) for c in self.cohort}


def plan(
    config: Config, algorithm: Algorithm, clients: Sequence[str], last: int | None = None
) -> Iterator[Round]:
    """All rounds of a run. The cohort is drawn from (seed, round).

    Args:
        config: the settings of the run.
        algorithm: its algorithm.
        clients: the names of all clients.
        last: the last round before the ending; None: ``train.rounds``.
    """
    rounds, size = config.train.rounds, config.train.clients_per_round or len(clients)
    size = 1 if find(config.algorithm.name).pools else size
    end = min(rounds, last or rounds)
    for number in range(1, end + 1):
        draw = np.random.default_rng(derive(config.seed, number, "cohort"))
        if config.privacy.unit == "client":  # a Poisson sample, as the accounting wants it
            chosen = np.flatnonzero(draw.random(len(clients)) < size / len(clients))
        else:
            chosen = draw.choice(len(clients), size=min(size, len(clients)), replace=False)
        due = config.eval.every and number % config.eval.every == 0
        over = number == end and not algorithm.final
        cohort = tuple(clients[int(i)] for i in sorted(chosen))
        yield Round(number, cohort, bool(due or over))
    if algorithm.final:
        yield Round(rounds + 1, tuple(clients), final=True)


def standing(config: Config, algorithm: Algorithm, number: int | None = None) -> Round:
    """A round without its cohort, to score or write models of that time; None: the last round."""
    last = config.train.rounds + algorithm.final
    number = last if number is None else number
    return Round(number, final=algorithm.final and number > config.train.rounds)

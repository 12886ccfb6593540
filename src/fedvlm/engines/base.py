"""What every engine offers to the round loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedvlm.algorithms import Algorithm
from fedvlm.tree import Tree

Scores = dict[str, float]


@dataclass(frozen=True)
class Task:
    """One client's work in one round.

    Attributes:
        client: its name.
        round: the round, from 1.
        down: what the server sent.
    """

    client: str
    round: int
    down: Tree


@dataclass(frozen=True)
class Reply:
    """What a client did.

    Attributes:
        client: its name.
        upload: what leaves it.
        weight: the number of its training examples.
        loss: mean training loss over the round's steps, in nats a token.
        end: its whole adapter after training; stays in process, for evaluation only.
    """

    client: str
    upload: Tree
    weight: float
    loss: float
    end: Tree


class Engine(Protocol):
    """Trains cohorts and scores models on one frozen base model."""

    adapter: Tree
    """The common initial adapter."""

    def train(self, algorithm: Algorithm, tasks: Sequence[Task]) -> Iterator[Reply]:
        """Runs ``start -> phases -> finish`` for each task and keeps what is personal."""
        ...

    def personal(self, algorithm: Algorithm, client: str, down: Tree) -> Tree:
        """The adapter that a client would use now, given what it was sent."""
        ...

    def evaluate(self, models: Iterable[tuple[str, Tree]]) -> dict[str, Scores]:
        """Scores of (client, adapter) pairs, each on the client's own held-out rows."""
        ...

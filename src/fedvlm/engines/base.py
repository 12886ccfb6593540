"""What every engine offers to the round loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedvlm.algorithms import Algorithm
from fedvlm.tree import Tree

Scores = dict[str, float]
Answer = dict[str, Any]
"""A model's answer to one held-out row: ``row`` (its number in the source), ``group`` (its value
in the column ``eval.group_by``, or None), ``reference``, ``prediction``, its scores, and
``weight``, by which its loss counts: answer tokens (SFT) or 1 (DPO)."""


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
        loss: mean training loss over the round's steps: nats a token (SFT), the DPO loss a pair.
        end: its whole adapter after training; stays in process, for evaluation only.
    """

    client: str
    upload: Tree
    weight: float
    loss: float
    end: Tree


class Engine(Protocol):
    """Trains cohorts and scores models on one frozen base model."""

    model: Any
    """The base model, with LoRA attached."""
    adapter: Tree
    """The common initial adapter."""
    width: int
    """Clients in a pass."""

    def train(self, algorithm: Algorithm, tasks: Sequence[Task]) -> Iterator[Reply]:
        """Runs ``start -> phases -> finish`` for each task and keeps what is personal."""
        ...

    def personal(self, algorithm: Algorithm, downs: Mapping[str, Tree]) -> list[Tree]:
        """The adapters that clients would use now, given what each was sent."""
        ...

    def evaluate(self, models: Iterable[tuple[str, Tree]]) -> dict[str, Scores]:
        """Scores of (client, adapter) pairs, each on the client's own held-out rows."""
        ...

    def answers(self, models: Iterable[tuple[str, Tree]]) -> dict[str, list[Answer]]:
        """What :meth:`evaluate` averages: every held-out row's answer and its scores."""
        ...

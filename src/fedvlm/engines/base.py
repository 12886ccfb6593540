"""What every engine offers to the round loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fedvlm.algorithms.base import Algorithm, Visit
from fedvlm.engines.stages import Stage
from fedvlm.engines.wire import Reply, Task
from fedvlm.tree import Tree

Scores = dict[str, float]
Answer = dict[str, Any]
"""A model's answer to one held-out row: ``row`` (its number in the source), ``group`` (its value
in the column ``eval.group_by``, or None), ``reference``, ``prediction``, its scores, and
``weight``, by which its loss counts: answer tokens (SFT) or 1 (DPO)."""


@dataclass(frozen=True)
class Models:
    """One model of each of some clients, named and not handed over: it is made where it is kept.

    Attributes:
        kind: ``global``, what a client has that keeps nothing of its own; ``personal``, what it
            makes of the download and what it keeps; ``end``, what it had when the round's training
            ended, before the server aggregated (of tasks that were ``rated``, once).
        downs: visits and what each client is sent. The downloads may be made while the engine asks
            for them; they are empty for ``end``.
    """

    kind: Literal["global", "personal", "end"]
    downs: Iterable[tuple[Visit, Tree]]


class Engine(Protocol):
    """Trains cohorts and scores models. What a client keeps never leaves the engine.

    An engine whose clients can fail leaves out those that do; the round continues with the others.
    """

    adapter: Tree
    """The common initial adapter."""

    algorithm: Algorithm
    """The run's."""

    stages: tuple[Stage, ...]
    """What uploads go through."""

    def train(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        """Runs the algorithm's ``work`` for each task and keeps what is personal."""
        ...

    def score(self, models: Models) -> dict[str, Scores]:
        """Scores of clients' models, each on the client's own held-out rows."""
        ...

    def answer(self, name: str, models: Models) -> dict[str, list[Answer]]:
        """Every held-out row's answer, which :meth:`score` averages; empty where they stay."""
        ...

    def export(self, models: Models, folders: Mapping[str, Path]) -> None:
        """Writes models as PEFT folders, by client; personal ones stay where they are."""
        ...

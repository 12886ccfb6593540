"""The interface of an engine, which the round loop uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fedvlm.algorithms.base import Algorithm, Visit
from fedvlm.engines.stages import Stage
from fedvlm.engines.summand import Summed
from fedvlm.engines.wire import Reply, Task
from fedvlm.tree import Tree

Scores = dict[str, float]
Answer = dict[str, Any]
"""A model's answer to one held-out row: ``row`` (its number in the source), ``group`` (its value
in the column ``eval.group_by``, or None), ``reference``, ``prediction``, its scores, and
``weight``, the weight of its loss in a mean: answer tokens (SFT) or 1 (DPO)."""


@dataclass(frozen=True)
class Models:
    """Names one model of each of some clients; the engine makes the model where its state is kept.

    Attributes:
        kind: ``global``, the model of a client that keeps nothing; ``personal``, the model from the
            download and the client's kept state; ``end``, the model at the end of the round's
            training, before aggregation. ``end`` exists for ``rated`` tasks, and is used up by one
            call.
        downs: visits, each with the client's download. The downloads may be made while the engine
            iterates; they are empty for ``end``.
    """

    kind: Literal["global", "personal", "end"]
    downs: Iterable[tuple[Visit, Tree]]


class Engine(Protocol):
    """Trains cohorts and scores models. The kept state of a client never leaves the engine.

    An engine whose clients can fail leaves failed clients out; the round continues with the others.
    """

    adapter: Tree
    """The common initial adapter."""

    algorithm: Algorithm
    """The algorithm of the run."""

    stages: tuple[Stage, ...]
    """The stages that uploads go through."""

    secure: bool
    """Whether the engine makes a secure sum by itself where the run asks for one."""

    def train(self, tasks: Sequence[Task]) -> Iterator[Reply | Summed]:
        """Runs the algorithm's ``work`` for each task, and keeps the personal states.

        With secure aggregation, the replies have no upload, and the sum follows them.
        """
        ...

    def score(self, models: Models) -> dict[str, Scores]:
        """Scores of clients' models, each on the client's own held-out rows."""
        ...

    def answer(self, name: str, models: Models) -> dict[str, list[Answer]]:
        """The answer to every held-out row; :meth:`score` gives their means.

        Empty for an engine whose answers stay with the clients.
        """
        ...

    def validate(self, models: Models) -> dict[str, float]:
        """Mean loss of clients' models on the clients' validation rows, for ``train.patience``.

        Clients without such rows are left out. Empty for an engine that is not told these losses.
        """
        ...

    def export(self, models: Models, folders: Mapping[str, Path]) -> None:
        """Writes models as PEFT folders, by client; personal models stay with their clients."""
        ...

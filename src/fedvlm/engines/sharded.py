"""One run on several devices: one process for each device, with a whole base or a share of it.

Process 0 runs the round loop. It gives every process a part of the next clients to train or to
score, does its own part, and takes the replies in the order of the cohort. So the server folds the
same uploads in the same order as with one process. The other processes do their parts
(:func:`serve`) and write the personal states of their clients.

A turn has at most ``width`` clients. Where the cohort fills its turns, passes hold the same clients
as with one process, and the results are bit-identical.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

from fedvlm.engines.base import Answer, Models, Scores
from fedvlm.engines.group import End, Group
from fedvlm.engines.portable import portable
from fedvlm.engines.shell import Shell
from fedvlm.engines.wire import Reply, Task
from fedvlm.errors import FedVLMError
from fedvlm.models.spread import settle
from fedvlm.tree import Tree

T = TypeVar("T")
Order = TypeVar("Order", "TrainPart", "ScorePart")


@portable
@dataclass(frozen=True)
class TrainPart:
    """A process's part of a turn of training.

    Attributes:
        round: the round.
        tasks: the part; may be empty.
        first: the position of its first task in the cohort.
        fresh: whether the round begins.
    """

    round: int
    tasks: Sequence[Task]
    first: int
    fresh: bool

    def perform(self, engine: Shell) -> list[Reply]:
        return list(engine.train(self.tasks, first=self.first, fresh=self.fresh))


@portable
@dataclass(frozen=True)
class ScorePart:
    """A process's part of the models to score: clients' names and adapters.

    None stands for the adapter at the end of the client's training, which this process has.
    """

    models: Sequence[tuple[str, Tree | None]]
    texts: bool

    def perform(self, engine: Shell) -> Mapping[str, Any]:
        made = [(c, engine.ended.pop(c) if tree is None else tree) for c, tree in self.models]
        return engine.answers(made) if self.texts else engine.evaluate(made)


class Sharded:
    """The engine of process 0: all processes train and score its clients.

    Attributes:
        width: clients in a turn, which is one pass of every process.
    """

    secure = False

    def __init__(self, engine: Shell, group: Group):
        self.engine = engine
        self.group = group
        self.adapter = engine.adapter
        self.algorithm, self.stages = engine.algorithm, engine.stages
        self.width = engine.width * group.size
        self._owners: dict[str, int] = {}  # client -> the process with its answers of this round

    def train(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        self._owners.clear()
        for start in range(0, len(tasks), self.width):
            orders, first = [], start
            for rank, part in enumerate(parts(tasks[start : start + self.width], self.group.size)):
                orders.append(TrainPart(tasks[0].round, part, first, fresh=not start))
                self._owners |= {task.client: rank for task in part}
                first += len(part)
            for replies in self._share(orders, lambda own: own.perform(self.engine)):
                yield from replies
        if tasks:
            self.engine.store.refresh(tasks[0].round)

    def score(self, models: Models) -> dict[str, Scores]:
        return self._scored(self._made(models), texts=False)

    def answer(self, name: str, models: Models) -> dict[str, list[Answer]]:
        return self._scored(self._made(models), texts=True)

    def validate(self, models: Models) -> dict[str, float]:
        nothing = [ScorePart([], texts=False)] * self.group.size  # others may hold weights
        return self._share(nothing, lambda _: self.engine.validate(models))[0]

    def export(self, models: Models, folders: Mapping[str, Path]) -> None:
        self.engine.export(models, folders)

    def _made(self, models: Models) -> Iterable[tuple[str, Tree | None]]:
        """Adapters made by process 0; adapters at the end of training stay with their process."""
        if models.kind == "end":
            return ((visit.client, None) for visit, _ in models.downs)
        return self.engine.made(models)

    def _scored(self, models: Iterable[tuple[str, Tree | None]], texts: bool) -> dict[str, Any]:
        """Scores by client; a client stays with its process, which remembers its answers."""
        found: dict[str, Any] = {}
        left = iter(models)
        while turn := list(islice(left, self.width)):
            new = [client for client, _ in turn if client not in self._owners]
            for rank, part in enumerate(parts(new, self.group.size)):
                self._owners |= dict.fromkeys(part, rank)
            orders = [
                ScorePart([m for m in turn if self._owners[m[0]] == rank], texts)
                for rank in range(self.group.size)
            ]
            scored: dict[str, Any] = {}
            for part in self._share(orders, lambda own: own.perform(self.engine)):
                scored |= part
            found |= {client: scored[client] for client, _ in turn}
        return found

    def _share(self, orders: Sequence[Order], work: Callable[[Order], Any]) -> list[Any]:
        """The results of all processes for their orders; process 0 works meanwhile."""
        for rank, order in enumerate(orders[1:], 1):
            self.group.send(order, rank)
        own = attempt(lambda: work(orders[0]))
        settle(self.engine.model)
        return _results(own, self.group)


def together(
    group: Group, prepare: Callable[[], T], same: Callable[[T], str], apart: bool = True
) -> T:
    """Prepares every process and returns this process's result; process 0 waits for all.

    Args:
        group: all processes.
        prepare: prepares one process.
        same: describes a result; the descriptions of all processes must be equal.
        apart: whether a process can prepare without the others. If not, a process that fails ends
            at once, because the others wait for it.

    Raises:
        FedVLMError: a process failed, or has other data or another model.
    """
    own = attempt(prepare)
    if not apart:
        own.get()
    described = attempt(lambda: same(own.get()))
    if group.rank:
        group.send(described.portable(group.rank), 0)
        return own.get()
    first, *others = _results(described, group)
    for rank, other in enumerate(others, 1):
        if other != first:
            raise FedVLMError(
                f"process {rank} of this run has other data or another model than process 0; all "
                "processes need the same files and the same versions of the packages"
            )
    return own.get()


def serve(group: Group, engine: Shell) -> None:
    """Trains and scores the parts that process 0 sends, until the run is over.

    Args:
        group: all processes.
        engine: the engine of this process.

    Raises:
        FedVLMError: process 0 failed or ended.
    """
    last: int | None = None  # the round that this process has trained in

    def perform(order: TrainPart | ScorePart) -> Any:
        nonlocal last
        if isinstance(order, ScorePart):
            return order.perform(engine)
        for past in range(order.round if last is None else last, order.round):
            engine.store.refresh(past)  # process 0 has committed this round since
        last = order.round
        return order.perform(engine)

    while not isinstance(order := group.receive(0), End):
        done = attempt(partial(perform, order))
        settle(engine.model)
        group.send(done.portable(group.rank), 0)
    if order.error:
        raise order.error


@portable
@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The result of some work: a value or an error."""

    value: Any = None
    error: Exception | None = None

    def get(self) -> T:
        """The value.

        Raises:
            Exception: the error.
        """
        if self.error:
            raise self.error
        return self.value

    def portable(self, rank: int) -> Outcome[T]:
        """For another process: an error other than :class:`FedVLMError` becomes its traceback."""
        if self.error is None or isinstance(self.error, FedVLMError):
            return self
        told = "".join(traceback.format_exception(self.error))
        return Outcome(error=RuntimeError(f"in process {rank}:\n{told}"))


def attempt(work: Callable[[], T]) -> Outcome[T]:
    """Does some work and catches its error, which waits until all processes have answered."""
    try:
        return Outcome(work())
    except Exception as error:
        return Outcome(error=error)


def _results(own: Outcome[T], group: Group) -> list[T]:
    """The results of all processes; raises the first error once all have answered."""
    outcomes = [own, *(group.receive(rank) for rank in range(1, group.size))]
    return [outcome.get() for outcome in outcomes]


def parts(whole: Sequence[T], number: int) -> list[Sequence[T]]:
    """``whole`` in ``number`` neighbouring pieces of nearly equal length."""
    bounds = [len(whole) * n // number for n in range(number + 1)]
    return [whole[a:b] for a, b in pairwise(bounds)]

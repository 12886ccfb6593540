"""Secure aggregation around an engine in one process, for tests and simulation.

The clients of the engine talk to the server by the messages of :mod:`fedvlm.privacy.blind`, as the
sites of a deployed run do. Nothing is protected here, where one process holds all clients: the
purpose is the same mean, the same bytes and the same errors as in a deployed run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedvlm.algorithms.base import Visit
from fedvlm.engines.base import Answer, Engine, Models, Scores
from fedvlm.engines.summand import Summand, Summed
from fedvlm.engines.wire import Reply, Task
from fedvlm.errors import FedVLMError
from fedvlm.settings.sections import Config
from fedvlm.tree import digest

if TYPE_CHECKING:
    from fedvlm.privacy.blind.client import Client
    from fedvlm.privacy.blind.collector import Collector
    from fedvlm.privacy.blind.messages import Context


class Blinded:
    """An engine whose clients send masked uploads.

    Args:
        engine: trains and scores the clients.
        config: the settings of the run.
    """

    secure = True

    def __init__(self, engine: Engine, config: Config):
        from fedvlm.privacy.blind.identity import Identity

        self.engine, self.config = engine, config
        self.adapter, self.algorithm, self.stages = engine.adapter, engine.algorithm, engine.stages
        self._make, self._identities = Identity, dict[str, Any]()

    def score(self, models: Models) -> dict[str, Scores]:
        return self.engine.score(models)

    def answer(self, name: str, models: Models) -> dict[str, list[Answer]]:
        return self.engine.answer(name, models)

    def validate(self, models: Models) -> dict[str, float]:
        return self.engine.validate(models)

    def export(self, models: Models, folders: Mapping[str, Path]) -> None:
        self.engine.export(models, folders)

    def train(self, tasks: Sequence[Task]) -> Iterator[Reply | Summed]:
        """Trains like the engine; the replies have no upload and no loss, and the sum is last."""
        from fedvlm.privacy.blind.messages import Void

        down, sent = common(tasks), Counter[str]()
        limit = self.config.wire.max_norm
        summand = Summand(self.algorithm, self.adapter, tasks[0].visit, down, limit)
        unit = max(task.visit.weight for task in tasks)
        collector, clients = self._begun(tasks, unit, summand.size, sent)
        asked = collector.asks_mask()
        visits: dict[str, Visit] = {task.client: task.visit for task in tasks}
        for reply in self.engine.train(tasks):
            assert isinstance(reply, Reply), "the engine makes no sum by itself"
            name = reply.client
            values, weight = summand.values(reply.upload, visits[name], unit, reply.loss or 0.0)
            numbers = partial(encoded, self.config, collector, values, weight)
            told, blob = clients[name].mask(asked[name], numbers)
            collector.masked(name, _counted(sent, name, told), blob)
            sent[name] += len(blob)
            yield Reply(name, {}, reply.weight, float("nan"), reply.steps, reply.passes)
        try:
            yield self._opened(collector, clients, summand, sent)
        except Void as why:
            yield Summed(bytes_up=dict(sent), void=str(why))

    def _begun(
        self, tasks: Sequence[Task], unit: float, size: int, sent: Counter[str]
    ) -> tuple[Collector, dict[str, Client]]:
        """The keys of all clients and their shares."""
        from fedvlm.privacy.blind.client import Client
        from fedvlm.privacy.blind.collector import Collector
        from fedvlm.privacy.blind.encoding import HEAD
        from fedvlm.privacy.blind.messages import Context

        names = [task.client for task in tasks]
        for name in names:
            self._identities.setdefault(name, self._make(name))
        pins = {name: self._identities[name].fingerprint for name in names}
        context: Context = Context(
            "here",
            tasks[0].round,
            1,
            "0" * 64,
            digest(tasks[0].down),
            float(unit),
            tasks[0].visit.sampled,
        )
        clients = {name: Client(self._identities[name], context, pins) for name in names}
        collector = Collector(context, HEAD + size)
        for name in names:
            collector.advertised(name, _counted(sent, name, clients[name].advertise()))
        for name, message in collector.asks_share().items():
            collector.shared(name, _counted(sent, name, clients[name].share(message)))
        return collector, clients

    def _opened(
        self,
        collector: Collector,
        clients: Mapping[str, Client],
        summand: Summand,
        sent: Counter[str],
    ) -> Summed:
        for name, message in collector.asks_agree().items():
            collector.agreed(name, _counted(sent, name, clients[name].agree(message)))
        for name, message in collector.asks_unmask().items():
            collector.unmasked(name, _counted(sent, name, clients[name].unmask(message)))
        return read(self.config, collector, summand, sent)


def common(tasks: Sequence[Task]) -> dict[str, Any]:
    """The download of all tasks.

    Raises:
        FedVLMError: downloads differ, or there is no task.
    """
    downs = {digest(down) for down in {id(task.down): task.down for task in tasks}.values()}
    if len(downs) != 1:
        raise FedVLMError(
            f"the clients of a secure sum need one download, and there are {len(downs)} different "
            "ones: choose another algorithm, or wire.secure=false"
        )
    return tasks[0].down


def encoded(config: Config, of: Any, values: np.ndarray, weight: float) -> np.ndarray:
    """The numbers of a client; ``of`` has the number of ``sites``.

    Raises:
        FedVLMError: a value is larger than ``wire.bound``.
    """
    from fedvlm.privacy.blind.encoding import Encoding, Overflow

    try:
        return Encoding(of.sites, config.wire.bound).encoded(values, weight)
    except Overflow as error:
        raise FedVLMError(f"{error} (wire.bound): raise wire.bound, or lower train.lr") from None


def read(config: Config, collector: Collector, summand: Summand, sent: Mapping[str, int]) -> Summed:
    """The mean in a sum; void where its numbers are impossible.

    Raises:
        Void: sites are too few.
    """
    from fedvlm.privacy.blind.encoding import Encoding

    total, names = collector.opened()
    try:
        values, weight = Encoding(collector.sites, config.wire.bound).decoded(total, len(names))
        tree, loss = summand.mean(values, weight)
    except ValueError as wrong:
        return Summed(bytes_up=dict(sent), void=f"the secure sum is refused: {wrong}")
    return Summed(names, tree, loss, dict(sent))


def _counted(sent: Counter[str], name: str, message: dict[str, Any]) -> dict[str, Any]:
    sent[name] += len(json.dumps(message))
    return message

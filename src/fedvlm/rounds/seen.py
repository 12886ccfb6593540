"""The last upload of each client, kept for an audit: what an honest but curious server sees."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedvlm.algorithms.table import find
from fedvlm.data.partition import Partition
from fedvlm.engines.base import Answer, Engine, Models, Scores
from fedvlm.engines.stages import opened
from fedvlm.engines.summand import Summed
from fedvlm.engines.wire import Reply, Task
from fedvlm.privacy import canaries
from fedvlm.settings.sections import Config
from fedvlm.store import files

FOLDER = "uploads"

logger = logging.getLogger("fedvlm")


def watched(engine: Engine, partition: Partition, config: Config, folder: Path) -> Engine:
    """The engine of a run; where the run has canaries, one that keeps uploads.

    With secure aggregation, the server sees no upload, and none is kept. Pooled rows send nothing.

    Args:
        engine: the engine of the run.
        partition: the run's partition, with its canaries.
        config: the settings of the run.
        folder: the folder of the run.
    """
    found = canaries.of(partition)
    if found:
        logger.warning(canaries.warning(found))
    if not found or config.wire.secure or find(config.algorithm.name).pools:
        return engine
    return Watched(engine, folder, partition.clients)


class Watched:
    """An engine whose uploads are kept, ``uploads/client-NAME.safetensors`` in the run's folder.

    A file has the client's last download, with the tensors of its upload in their place. The server
    knows all of them. With this as its download, the algorithm's ``model`` gives the model that the
    server can build of the client. A resumed run repeats the uploads of an unfinished round.

    Args:
        engine: the engine of the run.
        folder: the folder of the run.
        clients: the names of all clients.
    """

    secure = False

    def __init__(self, engine: Engine, folder: Path, clients: Sequence[str]):
        self.engine = engine
        self.adapter, self.algorithm, self.stages = engine.adapter, engine.algorithm, engine.stages
        self._paths = paths(folder, clients)

    def train(self, tasks: Sequence[Task]) -> Iterator[Reply | Summed]:
        """Trains, and keeps each upload before the server takes it."""
        downs = {task.client: task.down for task in tasks}
        for reply in self.engine.train(tasks):
            if isinstance(reply, Reply) and reply.upload:
                down = downs[reply.client]
                told = {**down, **opened(self.stages, reply.upload, down)}
                files.save_tree(self._paths[reply.client], told)
            yield reply

    def score(self, models: Models) -> dict[str, Scores]:
        return self.engine.score(models)

    def answer(self, name: str, models: Models) -> dict[str, list[Answer]]:
        return self.engine.answer(name, models)

    def validate(self, models: Models) -> dict[str, float]:
        return self.engine.validate(models)

    def export(self, models: Models, folders: Mapping[str, Path]) -> None:
        self.engine.export(models, folders)


def paths(folder: Path, clients: Sequence[str]) -> dict[str, Path]:
    """Client -> the file of its last upload; there is none where the client sends nothing."""
    names = files.slugs(clients)
    return {c: folder / FOLDER / f"client-{name}.safetensors" for c, name in names.items()}

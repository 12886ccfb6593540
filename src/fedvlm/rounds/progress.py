"""The interface through which a run reports its progress."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fedvlm.settings.sections import Config

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition


class Progress:
    """Gets the events of a run, as ``fedvlm.Callback``. This base class ignores them.

    A program's callback overrides what it needs::

        class Loud(fedvlm.Callback):
            def round(self, line, seconds):
                print(line["round"], line.get("train_loss"))

        fedvlm.run("config.yaml", callbacks=[Loud()])

    An exception in a callback ends the run, which can be resumed.
    """

    @contextlib.contextmanager
    def started(self, config: Config) -> Iterator[None]:
        """Context of the whole run."""
        yield

    def partitioned(self, partition: Partition) -> None:
        """The rows are divided among the clients."""

    def encoded(self, done: int, rows: int) -> None:
        """``done`` of ``rows`` rows are encoded; not called where an earlier run encoded them."""

    def checked(self, done: int, rows: int) -> None:
        """``done`` of ``rows`` rows are checked, where they are not encoded ahead."""

    def trained(self, client: str, loss: float) -> None:
        """A client finished its part of the round; the loss is NaN where it is not told."""

    def round(self, line: dict[str, Any], seconds: float) -> None:
        """A round was committed; ``line`` is its metrics line."""

    def finished(self, results: Any) -> None:
        """The results are written."""


Quiet = Progress


class Several(Progress):
    """Gives every event to several receivers, in their order."""

    def __init__(self, all_: Sequence[Progress]):
        self.all = tuple(all_)

    @contextlib.contextmanager
    def started(self, config: Config) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for one in self.all:
                stack.enter_context(one.started(config))
            yield

    def partitioned(self, partition: Partition) -> None:
        for one in self.all:
            one.partitioned(partition)

    def encoded(self, done: int, rows: int) -> None:
        for one in self.all:
            one.encoded(done, rows)

    def checked(self, done: int, rows: int) -> None:
        for one in self.all:
            one.checked(done, rows)

    def trained(self, client: str, loss: float) -> None:
        for one in self.all:
            one.trained(client, loss)

    def round(self, line: dict[str, Any], seconds: float) -> None:
        for one in self.all:
            one.round(line, seconds)

    def finished(self, results: Any) -> None:
        for one in self.all:
            one.finished(results)


def source(config: Config) -> str:
    """The data, in a few words."""
    scenes = config.data.scenes
    return config.data.path or f"scenes ({scenes.style} {scenes.strength:g}, {scenes.sites} sites)"

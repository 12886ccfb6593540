"""The interface through which a run reports its progress."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedvlm.settings.sections import Config

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition


class Progress:
    """Gets the events of a run. This base class ignores them."""

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


def source(config: Config) -> str:
    """The data, in a few words."""
    scenes = config.data.scenes
    return config.data.path or f"scenes ({scenes.style} {scenes.strength:g}, {scenes.sites} sites)"

"""Which sites are connected, and when the server last heard of each: a file that others read."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedvlm.deploy.overview import SEEN, WRITTEN
from fedvlm.store import files

logger = logging.getLogger("fedvlm.gate")


class Presence:
    """Notes every message that comes by an admitted connection, by the name in its certificate.

    A site sends a heartbeat every 30 seconds. The file is written every ``WRITTEN`` seconds, from
    the first connection on, so that a file that is old tells that the server is gone.

    Args:
        server: the folder of the server's kit, which gets the file.
    """

    def __init__(self, server: Path):
        self.path = server / SEEN
        self._heard: dict[str, float] = {}
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None

    @contextlib.contextmanager
    def connection(self, name: str, requests: Iterator[Any]) -> Iterator[Iterator[Any]]:
        """The messages of a connection, each of which is noted."""
        with self._lock:
            self._open[name] += 1
            self._heard[name] = time.time()
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="presence", daemon=True)
                self._writer.start()
        try:
            yield self._noted(name, requests)
        finally:
            with self._lock:
                self._open[name] -= 1

    def _noted(self, name: str, requests: Iterator[Any]) -> Iterator[Any]:
        for request in requests:
            self._heard[name] = time.time()
            yield request

    def now(self) -> dict[str, Any]:
        """The content of the file."""
        with self._lock:
            sites = {
                name: {"connected": self._open[name] > 0, "seen": round(seen, 1)}
                for name, seen in self._heard.items()
            }
        return {"written": round(time.time(), 1), "sites": sites}

    def _write(self) -> None:
        pause = threading.Event()
        while True:
            try:
                files.write_bytes(self.path, json.dumps(self.now()).encode(), durable=False)
            except OSError as error:
                logger.warning("'%s' cannot be written: %s", self.path, error.strerror)
            pause.wait(WRITTEN)

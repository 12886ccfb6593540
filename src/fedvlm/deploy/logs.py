"""Logs of a site: JSON lines with the run and the round, and files that are rotated.

Several processes of a site write ``site.log``. One process, that of ``fedvlm site start``, moves a
full file aside; the others notice by the file's inode and begin the new one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from pathlib import Path
from typing import IO, Any

LARGEST = 10 * 2**20  # bytes of a log before it is moved aside
KEPT = 5  # number of such files that are kept
ABOUT: dict[str, Any] = {"run": None, "round": None}
"""The run and the round of this process, in each of its lines."""


def about(asked: Mapping[str, Any]) -> None:
    """Takes the run and the round from a request of the server, where they have the right form."""
    run, round_ = asked.get("run"), asked.get("round")
    if isinstance(run, str) and len(run) <= 200:
        ABOUT["run"] = run
    if type(round_) is int:
        ABOUT["round"] = round_


class Line(logging.Formatter):
    """A record as one JSON line: ``time``, ``level``, ``run``, ``round``, ``message``."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        about = {"time": when, "level": record.levelname, **ABOUT, "message": message}
        return json.dumps(about, ensure_ascii=False)


def readable(line: str) -> str:
    """A line of a log for a person; a line that is no JSON stays as it is."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(line)
        return f"{found['time']} {found['level']} {found['message']}"
    return line


def log_to(path: str | None) -> None:
    """Sends this package's lines to a file, the site's log, or to standard error."""
    logger = logging.getLogger("fedvlm")
    handler = WatchedFileHandler(path) if path else logging.StreamHandler(sys.stderr)
    handler.setFormatter(Line())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def warn(path: Path, message: str) -> None:
    """Adds a warning to a log, from a process that does not log there."""
    record = logging.LogRecord("fedvlm", logging.WARNING, "", 0, message, None, None)
    with open(path, "a", encoding="utf-8") as file:
        file.write(Line().format(record) + "\n")


def rotate(path: Path) -> None:
    """Moves a full log aside. The processes that write it begin a new one."""
    if path.exists() and path.stat().st_size >= LARGEST:
        RotatingFileHandler(path, backupCount=KEPT, delay=True).doRollover()


def pipe(stream: IO[bytes], path: Path, lines: deque[str]) -> None:
    """Writes what a process says to a file that is rotated, from a thread, until the output ends.

    Args:
        stream: the output of the process.
        path: the file.
        lines: gets the lines too.
    """
    handler = RotatingFileHandler(path, maxBytes=LARGEST, backupCount=KEPT, errors="replace")

    def pump() -> None:
        with stream, contextlib.closing(handler):
            for raw in stream:
                line = raw.decode(errors="replace").rstrip("\n")
                handler.emit(logging.makeLogRecord({"msg": line}))
                lines.append(line)

    threading.Thread(target=pump, name="log", daemon=True).start()


@contextlib.contextmanager
def tail(path: Path | None) -> Iterator[Callable[[], list[str]]]:
    """Yields a function that returns the lines added to a file since its last call.

    A file that was moved aside is read to its end, and then the new one from its beginning.
    """
    if path is None:
        yield list
        return
    path.touch()
    file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115
    file.seek(0, os.SEEK_END)

    def lines() -> list[str]:
        nonlocal file
        found = file.readlines()
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                file.close()
                file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115
                found += file.readlines()
        return [line.rstrip("\n") for line in found]

    try:
        yield lines
    finally:
        file.close()

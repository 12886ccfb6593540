"""Shared by both sides of `deploy.py`: times of rounds, memory of processes, a time limit."""

from __future__ import annotations

import contextlib
import signal
import statistics
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MB = 10**6


@dataclass
class Outcome:
    """The measurements of one side.

    Attributes:
        walls: seconds of every round that counts, from the end of the round before to its end.
        there: the slowest client's own seconds in the same rounds.
        sent: bytes of one client's upload.
        saving: seconds in which a site writes its state, a part of its own seconds.
        peaks: process -> its peak resident memory in MB.
        shapes: shapes of the tensors in an upload.
    """

    walls: list[float]
    there: list[float]
    sent: int
    saving: float = 0.0
    peaks: dict[str, float] = field(default_factory=dict)
    shapes: list[list[int]] = field(default_factory=list)

    @property
    def overheads(self) -> list[float]:
        return [wall - there for wall, there in zip(self.walls, self.there, strict=True)]

    @property
    def overhead(self) -> float:
        return statistics.median(self.overheads)


class Watch:
    """Records the peak memory of some processes and of their descendants.

    Linux records the peak (VmHWM) of each process. The watch reads it every second, so it can miss
    only a peak in the last second of a process.

    Args:
        names: a word in a command line -> the name of the process. The first match counts.
    """

    def __init__(self, names: Mapping[str, str]):
        self.names = names
        self.peaks: dict[str, float] = {}
        self._roots: list[int] = []
        self._others: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def add(self, root: int) -> None:
        """Watches the processes of a command by their names."""
        self._roots.append(root)

    def add_other(self, root: int) -> None:
        """Watches the processes of a client, for the sum of their memory."""
        self._others.append(root)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(1.0):
            below = _children()
            for pid in _tree(self._roots, below):
                command = _read(pid, "cmdline").replace("\0", " ")
                name = next((name for word, name in self.names.items() if word in command), "")
                if name and (peak := _status(pid).get("VmHWM", 0.0)):
                    self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
            if self._others:
                held = [_status(p).get("RssAnon", 0.0) for p in _tree(self._others, below)]
                mean = sum(held) / len(self._others)
                self.peaks["a client"] = max(self.peaks.get("a client", 0.0), mean)


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        if fields := _read(pid, "stat").rpartition(")")[2].split():
            found.setdefault(int(fields[1]), []).append(pid)
    return found


def _tree(roots: list[int], below: dict[int, list[int]]) -> list[int]:
    found, waiting = [], list(roots)
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += below.get(pid, [])
    return found


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:  # the process has ended
        return ""


def _status(pid: int) -> dict[str, float]:
    lines = [line.split() for line in _read(pid, "status").splitlines()]
    sizes = [line for line in lines if line and line[0].startswith(("Vm", "Rss"))]
    return {name.rstrip(":"): int(kib) * 1024 / MB for name, kib, _ in sizes}


def check_memory(clients: int, each: int) -> None:
    """Exits where too little memory is free, before the kernel kills an unrelated process."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line) // MB
    if free < (wanted := clients * each + 2000):
        raise SystemExit(f"{clients} clients need about {wanted} MB, and {free} MB are available")


@contextlib.contextmanager
def limited(seconds: int, what: str) -> Iterator[None]:
    """Exits when the work exceeds its seconds, or when this process receives SIGTERM."""

    def over(number: int, frame: Any) -> None:
        raise SystemExit(f"{what}: {'no end' if number == signal.SIGALRM else 'ended'}")

    before = signal.signal(signal.SIGALRM, over), signal.signal(signal.SIGTERM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGTERM, before[1])

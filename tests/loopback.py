"""Helpers of tests that start a server and sites on this machine: real processes, mutual TLS."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedvlm.rounds import federate
from sites import written

if TYPE_CHECKING:
    from fedvlm.deploy.nvflare.demo import Started


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[Started]:
    """Yields a starter of commands of this checkout, with one thread each. Ends them on leaving."""
    from fedvlm.deploy.nvflare.demo import Started

    with pytest.MonkeyPatch.context() as patch, Started(folder) as started:
        paths = [str(Path(federate.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield started


def serve(started: Started, home: Path) -> None:
    """Starts the server of a federation."""
    started.start("server", "deploy", "server", "-f", str(home))


def begin(started: Started, name: str, invitation: Path, rows: Path, state: Path) -> None:
    """Joins a site to the federation that has invited it, and starts the site."""
    from fedvlm.deploy.nvflare.demo import enrol

    enrol(invitation, state)
    start(started, name, rows, state)


def start(started: Started, name: str, rows: Path, state: Path) -> None:
    """Starts a site that has joined, with a policy for few rows."""
    policy = written(rows.parent / "policy.yml")
    words = ("site", "start", "--data", str(rows), "--state", str(state), "--policy", policy)
    started.start(name, *words)


def until(what: Callable[[], object], seconds: float) -> None:
    """Waits until ``what`` returns something true, at most for some seconds."""
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.2)


def said(folder: Path, name: str) -> str:
    """The text that a command has printed."""
    return (folder / f"{name}.log").read_text()

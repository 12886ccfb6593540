"""Processes that end with the process that started them, however that process ends."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_STARTER = ThreadPoolExecutor(1, thread_name_prefix="starter")


def ends_with_parent() -> None:
    """Makes Linux kill this process when the thread that started it ends.

    The kernel does that even if this process is inside a function in C that holds the interpreter,
    so that none of its own threads can run. Other systems have no such call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def from_lasting_thread(start: Callable[[], T]) -> T:
    """Calls a function that starts a process, in a thread that lasts as long as this process.

    A process with :func:`ends_with_parent` would otherwise end with the caller's thread.
    """
    return _STARTER.submit(start).result()

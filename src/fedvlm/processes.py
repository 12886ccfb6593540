"""The processes of one run, one for each device: rank, number of processes, and cores.

``torchrun`` and ``accelerate launch`` start the same command several times. They pass each process
its place in environment variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Without
these variables the run has one process. This module does not import torch.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from importlib import import_module
from typing import Any

_own = False
SILENCE = 10.0  # seconds that the other processes wait before they print an error


def size() -> int:
    """The number of processes of the run."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in needed) else 1


def rank() -> int:
    """The rank of this process. Process 0 owns the run's folder and prints to the user."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local() -> tuple[int, int]:
    """The rank of this process on its machine, and the number of processes on that machine."""
    if size() == 1:
        return 0, 1
    number = int(os.environ.get("LOCAL_RANK", 0))
    return number, int(os.environ.get("LOCAL_WORLD_SIZE", size()))


def cores() -> int:
    """The number of cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable or 1


def own() -> None:
    """Says that this process was started for fedvlm alone; see :func:`imported`."""
    global _own
    if not _own:
        _own = True
        atexit.register(gc.freeze)  # else the collector visits all modules' objects at the end


def imported(*names: str) -> None:
    """Imports modules with the garbage collector off.

    Modules make many objects that stay. The collector would visit all of them again and again. In a
    process of our own, it leaves them out from then on.
    """
    new, collects = set(names) - sys.modules.keys(), gc.isenabled()
    gc.disable()
    try:
        for name in names:
            import_module(name)
        if new and _own:
            gc.freeze()
    finally:
        if collects:
            gc.enable()


def let_first_speak() -> None:
    """Delays an error of any process but process 0. Call it before printing the error.

    ``torchrun`` stops all processes when one of them ends, and process 0 usually has the same
    error. So process 0 prints its error and ends, and the other processes are stopped while they
    wait here. An error that process 0 does not have is printed after the wait.
    """
    if rank():
        time.sleep(SILENCE)


def peak_memory() -> dict[str, int]:
    """The largest memory of this process so far, in bytes: ``memory``, and ``device_memory``.

    The memory of a graphics card is what torch has allocated there. It is left out without a card,
    and ``memory`` is left out on systems that do not count it.
    """
    found: dict[str, int] = {}
    try:
        import resource
    except ImportError:
        pass
    else:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["memory"] = most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["device_memory"] = int(torch.cuda.max_memory_allocated())
    return found

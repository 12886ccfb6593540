"""The processes of one run, one a device: which one this is, and what they tell each other.

``torchrun`` and ``accelerate launch`` start the same command several times and say in the
environment which one each is (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Without
these there is one process, and nothing here imports torch.

Messages are Python objects; the tensors in them travel as they are, each once. All of them lie on
the CPU between passes, so they go by gloo, whatever device a process computes on.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

SILENCE = 10.0  # seconds


def size() -> int:
    """How many processes the run has."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in needed) else 1


def rank() -> int:
    """The number of this process; process 0 holds the run's folder and talks to people."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local() -> tuple[int, int]:
    """The number of this process among those of its machine, and how many these are."""
    if size() == 1:
        return 0, 1
    number = int(os.environ.get("LOCAL_RANK", 0))
    return number, int(os.environ.get("LOCAL_WORLD_SIZE", size()))


def cores() -> int:
    """How many cores this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable or 1


def let_first_speak() -> None:
    """Before an error is printed: process 0 has the same one, as a rule, and is not to be stopped.

    ``torchrun`` stops all processes once one has ended. So process 0 prints its error and ends, and
    that stops the others while they wait here; an error that it does not have is printed after.
    """
    if rank():
        time.sleep(SILENCE)

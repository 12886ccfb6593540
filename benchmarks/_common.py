"""What the benchmarks share: clocks, pairs, and a line that says where they were run."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Work = Callable[[], object]
ROOT = Path(__file__).resolve().parents[1]


def seconds(work: Work) -> float:
    """How long a piece of work takes; on a GPU, until it has done it."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def best_threads(work: Work) -> int:
    """The number of torch's threads, 1 or every core's, with which the work is faster."""
    import torch

    found = {}
    work()
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        found[threads] = seconds(work)
    best = min(found, key=lambda n: found[n])
    torch.set_num_threads(best)
    return best


def paired(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Times of the sides, which work by turns: what disturbs one disturbs the next, too.

    Args:
        sides: name -> does its work once, and says how long it took.
        repeats: turns of each.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            taken[name].append(work())
    return taken


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """The median of the pairs' ratios, the smallest and the largest."""
    pairs = [s / f for s, f in zip(slow, fast, strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def environment() -> str:
    """Date, commit, device and versions, in one line."""
    import torch
    import transformers

    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "no commit"
    device = f"{os.cpu_count()} cores ({_processor()})"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return (
        f"{datetime.date.today()}  {commit}  {device}  torch {torch.__version__}  "
        f"transformers {transformers.__version__}  python {platform.python_version()}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

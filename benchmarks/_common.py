"""Shared by the benchmarks: clocks, paired repeats, and a line about date and device."""

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
    """Wall time of a piece of work in seconds; on a GPU the clock waits for all kernels."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def best_threads(work: Work) -> int:
    """Sets torch's threads to 1 or to the number of cores, whichever is faster for the work.

    Returns:
        The chosen number.
    """
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
    """Times of several sides that work by turns, so that a disturbance hits all of them.

    Args:
        sides: name -> function that works once and returns its seconds.
        repeats: number of turns of each side.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            taken[name].append(work())
    return taken


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median, minimum and maximum of the ratios of pairs."""
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

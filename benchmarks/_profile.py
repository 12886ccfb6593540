"""The time of a piece of work by kind of operation, measured by torch's profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

from _common import Work

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "convolution")
ATTENTION = ("attention", "flash", "softmax")
KINDS = ("base products", "rank products", "attention", "elementwise and copies", "optimizer")


def kind(name: str, shapes: list[Any], rank: int) -> str:
    """The kind of an operation. A product with a side of length ``rank`` is a rank product."""
    name = name.lower()
    if "adam" in name or "sgd" in name:
        return "optimizer"
    if any(word in name for word in ATTENTION):
        return "attention"
    if any(word in name for word in PRODUCTS):
        matrices = [s[-2:] for s in shapes if isinstance(s, list) and len(s) in (2, 3)]
        return "rank products" if any(rank in m for m in matrices) else "base products"
    return "elementwise and copies"


def profile(work: Work, rank: int) -> dict[str, float]:
    """Seconds by kind of operation. `Python and waiting` is the rest of the wall time.

    On a GPU the kinds count the time of kernels, and the rest is the time without a kernel. The
    profiler slows Python down, so trust the shares more than the sum.
    """
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    work()
    with torch.profiler.profile(activities=activities, record_shapes=True) as found:
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    taken: dict[str, float] = defaultdict(float)
    for event in found.key_averages(group_by_input_shape=True):
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: the time of its operation includes it
        of_device = event.self_device_time_total if cuda else event.self_cpu_time_total
        taken[kind(event.key, event.input_shapes, rank)] += of_device / 1e6
    table = {name: taken[name] for name in KINDS}
    return table | {"Python and waiting": max(0.0, wall - sum(table.values()))}


def show(title: str, table: dict[str, float]) -> None:
    """Prints a table of :func:`profile`."""
    total = sum(table.values())
    print(f"where time goes, {title}: {total:.2f} s with the profiler on")
    for name, taken in table.items():
        print(f"  {name:<24} {taken:8.3f} s {100 * taken / total:6.1f} %", flush=True)

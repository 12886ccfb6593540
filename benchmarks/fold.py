"""Speed and memory of the server's fold: a weighted mean of uploads, one after another.

The script folds the uploads of a cohort with the class of the round loop, and copies the same
tensors over one more upload (``torch._foreach_copy_``), by turns in one process. Then a fresh
process for each size of a cohort makes and folds uploads, and prints the rise of its memory.

    python benchmarks/fold.py [--quick]

The script prints medians of the repeats. The last line is `RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from fedvlm.tree import Mean, Tree, nbytes

LAYERS = {  # size of an upload -> shape of each B, and the number of layers
    "tiny, 0.2 MB": ((128, 8), 49),
    "a 2 B model, 34 MB": ((2048, 16), 256),
}


def upload(shape: tuple[int, int], layers: int, seed: int) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    return {f"layers.{k}.lora_B.weight": torch.randn(shape, generator=draw) for k in range(layers)}


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def speed(name: str, cohort: int, repeats: int) -> float:
    """The speed of the fold over the speed of a copy."""
    uploads = [upload(*LAYERS[name], seed) for seed in range(cohort)]
    target = {key: torch.empty_like(tensor) for key, tensor in uploads[0].items()}

    def fold() -> None:
        mean = Mean()
        for number, tree in enumerate(uploads, start=1):
            mean.add(tree, number)
        mean.tree()

    def copy() -> None:
        for tree in uploads:
            torch._foreach_copy_(list(target.values()), list(tree.values()))

    fold()
    copy()
    taken = [(seconds(fold), seconds(copy)) for _ in range(repeats)]
    ratios = [copied / folded for folded, copied in taken]
    size = nbytes(uploads) / 1e9
    folded, copied = (size / statistics.median(side) for side in zip(*taken, strict=True))
    ratio = statistics.median(ratios)
    print(
        f"{name:<20} {cohort:>5} uploads  fold {folded:6.2f} GB/s  copy {copied:6.2f} GB/s  "
        f"ratio {ratio:.2f}  ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )
    return ratio


def rise(name: str, cohort: int) -> float:
    """The rise of the process's peak memory in MB while it makes and folds uploads."""

    def peak() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000

    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak
    mean, before = Mean(), peak()
    for number in range(cohort):
        mean.add(upload(*LAYERS[name], number), 1.0)
    mean.tree()
    return peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller cohorts")
    parser.add_argument("--rise", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rise:
        print(json.dumps(rise(options.rise[0], int(options.rise[1]))))
        return
    small, large = LAYERS
    cohorts = {small: 100, large: 5} if options.quick else {small: 1000, large: 20}
    ratios = {
        name: speed(name, cohort, 5 if options.quick else 9) for name, cohort in cohorts.items()
    }
    for cohort in (1, 4, 16) if options.quick else (1, 4, 16, 64):
        command = [sys.executable, __file__, "--rise", large, str(cohort)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(
            f"{large:<20} {cohort:>5} uploads  memory + {json.loads(done.stdout):.0f} MB",
            flush=True,
        )
    worst = min(ratios, key=lambda name: ratios[name])
    print(f"RATIO {ratios[worst]:.2f} speed of the fold over a copy of the same bytes, {worst}")


if __name__ == "__main__":
    main()

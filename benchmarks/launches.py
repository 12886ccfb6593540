"""The operations of a step of the cohort engine, beside another commit. Needs no GPU.

    python benchmarks/launches.py OTHER [--quick] [--repeats 7]

On a GPU a step of many small operations takes as long as their launches. The script counts these
operations on the CPU, at PyTorch's dispatcher, without views and allocations: the difference of
rounds of three and of two steps. 16 clients train the language layers of a thin `smol` in one pass,
in bf16, with batches of two short rows: SmolVLM's classes with the 30 layers of SmolLM2-135M and
random weights, but a width of 32 instead of 576, on which the number does not depend. The column
`frozen` is the same rows through the frozen model, forward and back to the inputs.

The CPU time of a step follows, in bf16 and in fp32. Both commits take turns, each in a process with
one thread. OTHER is a checkout of another commit; without it, this checkout is
beside itself. `--quick` has one turn in bf16. The last line is `RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from _common import ROOT, environment, paired, ratio

KINDS = {
    "products": ("mm", "bmm", "addmm_", "baddbmm_", "baddbmm", "addmm"),
    "casts": ("_to_copy",),
    "sums and scalings": ("mul", "mul_", "add", "add_", "neg", "pow", "div", "addcmul", "addcmul_"),
    "reductions": ("sum", "mean", "linalg_vector_norm"),
    "concatenations": ("cat", "slice_backward", "zeros", "clone", "stack"),
}
THIN = 32


class Side:
    """A process that imports fedvlm from a checkout."""

    def __init__(self, checkout: Path, width: int, dtype: str):
        settings = {
            "PYTHONPATH": str(checkout.resolve() / "src"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "_steps", str(width), dtype],
            cwd=Path(__file__).parent,
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, word: str) -> Any:
        """An answer of :mod:`_steps`."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def by_kind(counts: dict[str, int]) -> Counter[str]:
    of = {name: kind for kind, names in KINDS.items() for name in names}
    found: Counter[str] = Counter()
    for name, number in counts.items():
        found[of.get(name, "others")] += number
    return found


def show_counts(here: Side, there: Side) -> float:
    """Prints the table of operations; returns their ratio."""
    columns = [by_kind(side.ask("step")) for side in (there, here)]
    columns.append(by_kind(here.ask("frozen")))
    print(f"{'operations of a step':<22}{'there':>8}{'here':>8}{'frozen':>8}")
    for kind in (*KINDS, "others"):
        print(f"{kind:<22}" + "".join(f"{own[kind]:>8}" for own in columns))
    sums = [own.total() for own in columns]
    print(f"{'all':<22}" + "".join(f"{own:>8}" for own in sums), flush=True)
    return sums[0] / sums[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", nargs="?", type=Path, default=ROOT, help="checkout of a commit")
    parser.add_argument("--quick", action="store_true", help="one turn, in bf16")
    parser.add_argument("--repeats", type=int, default=7, help="turns (default: %(default)s)")
    options: Any = parser.parse_args()
    print(environment())
    fewer = 0.0
    for dtype in ("bfloat16",) if options.quick else ("bfloat16", "float32"):
        here, there = (Side(checkout, THIN, dtype) for checkout in (ROOT, options.other))
        fewer = fewer or show_counts(here, there)
        turns = {
            name: lambda s=s: s.ask("seconds") for name, s in (("there", there), ("here", here))
        }
        paired(turns, 1)
        taken = paired(turns, 1 if options.quick else options.repeats)
        faster, low, high = ratio(taken["there"], taken["here"])
        before, now = (1000 * statistics.median(taken[name]) for name in turns)
        print(
            f"a step of a thin smol, {dtype}: {before:.0f} ms there, {now:.0f} ms here, "
            f"{faster:.2f} ({low:.2f}-{high:.2f})",
            flush=True,
        )
        for side in (here, there):
            side.close()
    print(f"RATIO {fewer:.2f} operations of a step, there / here")


if __name__ == "__main__":
    main()

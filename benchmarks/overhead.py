"""The overhead of a round: the share of its wall time outside the training steps.

The script runs federated rounds of 10, 100 and 1,000 clients on a model of one layer, whose steps
are as cheap as possible. A step consists of forward and loss, backward, clipping and the optimizer.
The rest of the round is overhead: the draw of the cohort, encoding and collating rows, reading and
writing personal states, aggregation, the commit to the disk.

    python benchmarks/overhead.py [--quick]

The script prints medians over the rounds after the first. The last line is `RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from _small import settings
from fedvlm.batches import objectives
from fedvlm.engines import cohort as cohort_engine
from fedvlm.rounds import federate
from fedvlm.rounds.progress import Progress

TARGETS = {10: 0.03, 100: 0.05, 1000: 0.10}


class Enough(Exception):
    """All requested rounds are done."""


class Inside:
    """Seconds inside the counted functions."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._deep = False

    def count(self, owner: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._deep:
                return plain(*args, **kwargs)
            self._deep = True
            began = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began
                self._deep = False

        setattr(owner, name, timed)


class Rounds(Progress):
    """Wall time and time inside steps of each round, commit included."""

    def __init__(self, inside: Inside, wanted: int):
        self.inside, self.wanted = inside, wanted
        self.found: list[tuple[float, float]] = []
        self.mark = (0.0, 0.0)

    def round(self, line: dict[str, Any], seconds: float) -> None:
        now = time.perf_counter(), self.inside.seconds
        if line["round"] > 1:
            self.found.append((now[0] - self.mark[0], now[1] - self.mark[1]))
        if len(self.found) == self.wanted:
            raise Enough
        self.mark = time.perf_counter(), self.inside.seconds


def measure(folder: Path, clients: int, model: str, rounds: int, inside: Inside) -> float:
    """The median share of the wall time outside the steps."""
    told = Rounds(inside, rounds)
    with contextlib.suppress(Enough):
        chosen = settings(folder / model, clients, clients)
        chosen |= {"model": {"name": "tiny"}} if model == "tiny" else {}
        federate.run(chosen, progress=told)
    shares = [1 - steps / wall for wall, steps in told.found]
    wall, steps = (1000 * statistics.median(side) for side in zip(*told.found, strict=True))
    share = statistics.median(shares)
    print(
        f"{model:>9}  {clients:>5} clients  round {wall:8.1f} ms  steps {steps:8.1f} ms  "
        f"overhead {share:6.1%} ({min(shares):.1%} to {max(shares):.1%})  "
        f"target {TARGETS[clients]:.0%}",
        flush=True,
    )
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 and 100 clients")
    parser.add_argument("--clients", type=int, choices=TARGETS, help="only this number of clients")
    options = parser.parse_args()
    cases = [options.clients] if options.clients else list(TARGETS)[: 2 if options.quick else 3]
    inside = Inside()
    inside.count(objectives, "sft_terms")
    inside.count(torch.Tensor, "backward")
    inside.count(torch.optim.AdamW, "step")
    inside.count(cohort_engine, "clip")
    with tempfile.TemporaryDirectory(prefix="fedvlm-overhead-") as folder:
        path = Path(folder)
        shares = {n: measure(path, n, "one-layer", 5 if n > 10 else 15, inside) for n in cases}
        if not options.quick:
            for clients in (10, 100):
                measure(path, clients, "tiny", 5, inside)
    last = max(shares, key=lambda n: shares[n] / TARGETS[n])
    print(f"RATIO {shares[last]:.3f} share of a round outside the steps, {last} clients a round")


if __name__ == "__main__":
    sys.exit(main())

"""The overhead of a round: the share of its wall time outside the training steps.

The script runs federated rounds of 10, 100 and 1,000 clients on a model of one layer, whose steps
are as cheap as possible. A step consists of forward and loss, backward, clipping and the optimizer.
The rest of the round is overhead: the draw of the cohort, encoding and collating rows, reading and
writing personal states, aggregation, the commit to the disk. `auto` is the default algorithm.

    python benchmarks/overhead.py [--quick] [--algorithm NAME] [--clients NUMBER]

The script prints medians over the rounds after the first. Two shares are printed: of the wall time,
and of the processor time of the thread that runs the rounds. The second one has no waits, and
other work on the machine changes it less. The last line is `RATIO <number> <what>`: the worst share
of the wall time over its target.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from _small import settings
from fedvlm.batches import objectives
from fedvlm.engines import cohort as cohort_engine
from fedvlm.rounds import federate
from fedvlm.rounds.progress import Progress

TARGETS = {"lora": 0.05, "plora": 0.05, "auto": 0.08}
CLIENTS = (10, 100, 1000)


class Enough(Exception):
    """All requested rounds are done."""


class Clocks(NamedTuple):
    """Seconds of wall time, and of processor time of this thread."""

    wall: float
    thread: float

    @classmethod
    def now(cls) -> Clocks:
        return cls(time.perf_counter(), time.thread_time())

    def since(self, began: Clocks) -> Clocks:
        return Clocks(self.wall - began.wall, self.thread - began.thread)


class Inside:
    """Seconds inside the counted functions."""

    def __init__(self) -> None:
        self.spent = Clocks(0.0, 0.0)
        self._deep = False

    def count(self, owner: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._deep:
                return plain(*args, **kwargs)
            self._deep = True
            began = Clocks.now()
            try:
                return plain(*args, **kwargs)
            finally:
                more = Clocks.now().since(began)
                self.spent = Clocks(self.spent.wall + more.wall, self.spent.thread + more.thread)
                self._deep = False

        setattr(owner, name, timed)


class Rounds(Progress):
    """The time of each round, commit included, and its time inside steps."""

    def __init__(self, inside: Inside, wanted: int):
        self.inside, self.wanted = inside, wanted
        self.found: list[tuple[Clocks, Clocks]] = []
        self.mark = (Clocks.now(), inside.spent)

    def round(self, line: dict[str, Any], seconds: float) -> None:
        now = Clocks.now(), self.inside.spent
        if line["round"] > 1:
            self.found.append((now[0].since(self.mark[0]), now[1].since(self.mark[1])))
        if len(self.found) == self.wanted:
            raise Enough
        self.mark = Clocks.now(), self.inside.spent


def measure(
    folder: Path, algorithm: str, clients: int, model: str, rounds: int, inside: Inside
) -> float:
    """The median share of the wall time outside the steps."""
    told = Rounds(inside, rounds)
    with contextlib.suppress(Enough):
        chosen = settings(folder / f"{model}-{algorithm}", clients, clients)
        chosen |= {"algorithm": {"name": algorithm}}
        chosen |= {"model": {"name": "tiny"}} if model == "tiny" else {}
        federate.run(chosen, progress=told)
    shares = [1 - steps.wall / whole.wall for whole, steps in told.found]
    thread = statistics.median(1 - steps.thread / whole.thread for whole, steps in told.found)
    wall, inner = (
        1000 * statistics.median(side.wall for side in sides)
        for sides in zip(*told.found, strict=True)
    )
    share = statistics.median(shares)
    print(
        f"{model:>9} {algorithm:>6} {clients:>5} clients  round {wall:8.1f} ms  "
        f"steps {inner:8.1f} ms  overhead {share:6.1%} ({min(shares):.1%} to {max(shares):.1%})  "
        f"of the thread {thread:6.1%}  target {TARGETS[algorithm]:.0%}",
        flush=True,
    )
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 and 100 clients")
    parser.add_argument("--clients", type=int, choices=CLIENTS, help="only this number of clients")
    parser.add_argument("--algorithm", choices=TARGETS, help="only this algorithm")
    options = parser.parse_args()
    cases = [options.clients] if options.clients else CLIENTS[: 2 if options.quick else 3]
    algorithms = [options.algorithm] if options.algorithm else list(TARGETS)
    inside = Inside()
    inside.count(objectives, "sft_terms")
    inside.count(torch.Tensor, "backward")
    inside.count(torch.optim.AdamW, "step")
    inside.count(cohort_engine, "clip")
    found: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory(prefix="fedvlm-overhead-") as folder:
        for name, n in itertools.product(algorithms, cases):
            rounds = {10: 15, 100: 6, 1000: 3}[n]
            found[name, n] = measure(Path(folder), name, n, "one-layer", rounds, inside)
        if not options.quick:
            for name, n in itertools.product(algorithms, (10, 100)):
                measure(Path(folder), name, n, "tiny", 3, inside)
    name, n = max(found, key=lambda case: found[case] / TARGETS[case[0]])
    worst = found[name, n] / TARGETS[name]
    print(f"RATIO {worst:.3f} share outside the steps over its target, {name}, {n} clients a round")


if __name__ == "__main__":
    sys.exit(main())

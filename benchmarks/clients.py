"""Rounds of 100 clients out of 100, 10,000 and 100,000 registered clients: time and memory.

Each number of clients has its own process. The process runs the federated round loop with LoRA on
two rows a client, one of them for training. Before the first round every client has a personal
state on the disk. Many states were written again in random order, so half of the bytes on the disk
are stale, as after a long run, and the rounds have old packs to merge. The processes then run
rounds by turns. The time of a round is its wall time from the draw of the cohort to the end of the
commit. The rows of all cohorts are encoded before the first round.

    python benchmarks/clients.py [--quick] [--model one-layer] [--registered 100 5000]

The script prints medians, and the memory after the start and at the peak of the rounds. The last
line is `RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from _small import settings
from fedvlm.algorithms.base import NOBODY
from fedvlm.algorithms.dry import rehearse
from fedvlm.config import load
from fedvlm.rounds import federate
from fedvlm.rounds import prepare as preparing
from fedvlm.rounds.progress import Progress
from fedvlm.rounds.schedule import plan
from fedvlm.store.run import Store

COHORT = 100
AGAIN = 6  # how often a quarter of the clients is written again


class Paced(Progress):
    """Runs a round for each line of input, and prints its seconds and the memory so far."""

    def __init__(self, began: float):
        self.began = began

    def round(self, line: dict[str, Any], seconds: float) -> None:
        taken = time.perf_counter() - self.began
        print(json.dumps({"seconds": taken, **memory()}), flush=True)
        if not sys.stdin.readline().strip():
            sys.exit()
        if not line["round"]:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that of the rounds
        self.began = time.perf_counter()


def memory() -> dict[str, float]:
    """Resident memory now and at its peak, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return {"resident": int(found["VmRSS"]) / 1000, "peak": int(found["VmHWM"]) / 1000}


def run(folder: Path, clients: int, model: str, rounds: int) -> None:
    """Prepares states and encoded rows, then runs rounds until the input ends."""
    began = time.perf_counter()
    chosen = settings(folder, clients, COHORT, rows=2) | {"lora": {"rank": 1, "alpha": 2}}
    config = load(chosen | ({"model": {"name": "tiny"}} if model == "tiny" else {}))
    engine, partition, store = preparing.prepare(config)
    with store.locked():
        federate.begin(config, store, {}, False)
        algorithm = engine.algorithm
        down = algorithm.send(algorithm.init(engine.adapter), NOBODY)
        mine = rehearse(algorithm, engine.adapter, NOBODY, down, 1).sent.keep
        fill(store, partition.clients, mine, engine.width)
        for round_ in itertools.islice(plan(config, algorithm, partition.clients), rounds):
            for client in round_.cohort:  # a client's first round brings new rows
                for row in partition.splits[client].train:
                    engine.collator.features(int(row))
        federate.drive(config, engine, partition.weights, store, Paced(began))


def fill(store: Store, clients: tuple[str, ...], mine: Any, width: int) -> None:
    """Writes a state for each client, then new states for many, pass by pass as rounds do."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(clients))]
    orders += [rng.permutation(len(clients))[: len(clients) // 4] for _ in range(AGAIN)]
    position = 0
    for order in orders:
        for start in range(0, len(order), width):
            group = order[start : start + width]
            store.keep(0, position, {clients[i]: mine for i in group})
            position += len(group)


class Process:
    """The process of one number of registered clients. It runs a round on demand."""

    def __init__(self, folder: str, clients: int, model: str, rounds: int):
        command = [sys.executable, __file__, "--run", folder, str(clients), "--model", model]
        command += ["--rounds", str(rounds)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes)
        self.clients = clients

    def answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.clients} clients ended")
        return json.loads(line)

    def round(self) -> dict[str, float]:
        print("go", file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100 and 2,000 clients")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument(
        "--registered", type=int, nargs="+", default=[100, 10_000, 100_000], metavar="CLIENTS"
    )
    parser.add_argument(
        "--model", choices=("tiny", "one-layer"), help="default: tiny, with --quick one-layer"
    )
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(Path(options.run[0]), int(options.run[1]), options.model, options.rounds + 1)
        return
    counts = [100, 2_000] if options.quick else options.registered
    model = options.model or ("one-layer" if options.quick else "tiny")
    with tempfile.TemporaryDirectory(prefix="fedvlm-clients-") as folder:
        settings(Path(folder), counts[0], COHORT, rows=2)  # writes the model once for all processes
        processes = [Process(folder, clients, model, options.rounds) for clients in counts]
        for process in processes:
            told = process.answer()
            print(
                f"{process.clients:>7} clients  start {told['seconds']:6.1f} s  "
                f"resident {told['resident']:6.0f} MB",
                flush=True,
            )
        found: dict[int, list[dict[str, float]]] = {n: [] for n in counts}
        for number in range(options.rounds + 1):
            for process in processes:
                told = process.round()
                if number:  # the first one warms up
                    found[process.clients].append(told)
        for process in processes:
            process.end()
    least = [told["seconds"] for told in found[counts[0]]]
    for clients, rows in found.items():
        taken = [told["seconds"] for told in rows]
        ratios = [one / other for one, other in zip(taken, least, strict=True)]
        ratio = statistics.median(ratios)
        print(
            f"{clients:>7} clients  round {statistics.median(taken):6.3f} s  ratio {ratio:.3f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})  peak {rows[-1]['peak']:6.0f} MB",
            flush=True,
        )
    print(
        f"RATIO {ratio:.3f} a round of {COHORT} clients out of {counts[-1]:,} over one of {COHORT} "
        f"out of {counts[0]}, {model}"
    )


if __name__ == "__main__":
    main()

"""Speed of the cohort engine against the reference: a round's training, side by side in one run.

    python benchmarks/engine.py [--quick]

Both engines train the same clients on the same batches from the same adapters, by turns; each at
the thread setting that is best for it. Printed are medians of the repeats and their ratio; the
last line is `RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import fedvlm
from fedvlm.algorithms import Client, build
from fedvlm.engines.base import Task
from fedvlm.federate import prepare

ROWS = 24  # a client's; all are encoded before the clock starts


def prepared(engine: str, clients: int, batch: int, steps: int, target: str):
    """An engine and one round's work for it."""
    config = fedvlm.load_config(
        {
            "output": tempfile.mkdtemp() + "/run",
            "data": {"scenes": {"sites": clients, "rows": ROWS, "style": "concept"}},
            "partition": {"min_rows": 4},
            "lora": {"target": target},
            "train": {"batch_size": batch, "local_steps": steps},
            "engine": {"name": engine, "clients": clients if engine == "cohort" else None},
        }
    )
    made, partition, _ = prepare(config)
    algorithm = build(config.algorithm)
    state = algorithm.init(made.adapter)
    tasks = [Task(c, 1, algorithm.download(state, Client(c, 1.0))) for c in partition.clients]
    made.collator.training([i for s in partition.splits.values() for i in s.train])
    return lambda: list(made.train(algorithm, tasks))


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def best_threads(work, most: int) -> int:
    """The number of threads with which it is fastest."""
    found = {}
    for threads in range(1, most + 1):
        torch.set_num_threads(threads)
        work()
        found[threads] = seconds(work)
    return min(found, key=lambda n: found[n])


def compare(clients: int, batch: int, steps: int, target: str, repeats: int) -> float:
    sides = {e: prepared(e, clients, batch, steps, target) for e in ("reference", "cohort")}
    threads = {e: best_threads(work, min(2, os.cpu_count() or 1)) for e, work in sides.items()}
    taken: dict[str, list[float]] = {e: [] for e in sides}
    for _ in range(repeats):
        for engine, work in sides.items():
            torch.set_num_threads(threads[engine])
            taken[engine].append(seconds(work))
    per = {e: 1000 * statistics.median(t) / (clients * steps) for e, t in taken.items()}
    ratio = per["reference"] / per["cohort"]
    pairs = [r / c for r, c in zip(taken["reference"], taken["cohort"], strict=True)]
    print(
        f"{target:>10}  {clients:>3} clients  batch {batch}  "
        f"reference {per['reference']:7.1f} ms  cohort {per['cohort']:7.1f} ms a client step  "
        f"threads {threads['reference']}/{threads['cohort']}  "
        f"ratio {ratio:.2f}  ({min(pairs):.2f} to {max(pairs):.2f})",
        flush=True,
    )
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one setting, under a minute")
    parser.add_argument("--target", default="all-linear,language")
    options = parser.parse_args()
    repeats, steps = (3, 2) if options.quick else (5, 3)
    cases = [(10, 4)] if options.quick else [(4, 4), (10, 1), (10, 4), (10, 8), (32, 1)]
    targets = ["all-linear"] if options.quick else options.target.split(",")
    found = {(t, n, b): compare(n, b, steps, t, repeats) for t in targets for n, b in cases}
    (target, clients, batch), ratio = max(found.items(), key=lambda item: item[1])
    if (targets[0], 10, 8) in found:
        target, clients, batch = targets[0], 10, 8
        ratio = found[target, clients, batch]
    print(
        f"RATIO {ratio:.2f} cohort engine over reference, tiny, {target}, "
        f"{clients} clients, batch {batch}"
    )


if __name__ == "__main__":
    main()

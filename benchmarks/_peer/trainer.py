"""A common loop: a `Trainer` for every client, with PEFT's state dicts in between.

Run by `peers.py`: python -m _peer.trainer JOB NAME LOOP
"""

from __future__ import annotations

import sys

from _peer.common import LOOPS, Job, Pace, Tree, best_threads, read, write


def main() -> None:
    folder, name, loop = sys.argv[1:]
    job = Job(folder)
    model = job.model()
    best_threads(job, model)
    shared, total = job.adapter, sum(job.weights)
    pace = Pace(job, name)
    for round_ in range(1, job.rounds + 1):
        pace.wait()
        mean: Tree = {}
        for client, weight in enumerate(job.weights):
            write(model, shared)
            LOOPS[loop](model, job.batches(client, round_), job)
            for key, tensor in read(model).items():
                mean[key] = mean.get(key, 0) + tensor * (weight / total)
        shared = mean
        pace.done(shared)


if __name__ == "__main__":
    main()

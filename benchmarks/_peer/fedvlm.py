"""fedvlm with one process for each core, like `torchrun -m fedvlm run`.

Run by `peers.py`: torchrun --nproc-per-node N -m _peer.fedvlm JOB NAME
"""

from __future__ import annotations

import sys
from pathlib import Path

import fedvlm
from _peer.common import Job, Pace
from fedvlm.engines.group import joined
from fedvlm.engines.wire import Forms
from fedvlm.rounds import federate
from fedvlm.rounds.objects import Objects
from fedvlm.rounds.progress import Progress
from fedvlm.rounds.schedule import Round


def main() -> None:
    folder, name = sys.argv[1:]
    config = fedvlm.load_config(Path(folder) / "config.yaml", f"output={folder}/{name}")
    with joined() as group:
        if group.rank:
            federate._follow(config, group, Objects())
            return
        engine, partition, store, *_ = federate._prepare_all(config, group, Progress(), Objects())
        state = engine.algorithm.init(engine.adapter)
        forms = Forms(engine.algorithm, engine.adapter)
        job = Job(folder)
        pace = Pace(job, name)
        for number in range(1, job.rounds + 1):
            pace.wait()
            plan = Round(number, tuple(partition.clients), evaluate=False)
            weights = partition.weights
            state, line = federate.one_round(plan, engine, weights, state, (), Progress(), forms)
            store.commit(number, state, line, {"round": number})
            pace.done(dict(state))


if __name__ == "__main__":
    main()

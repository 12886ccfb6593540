"""Flower's simulation on Ray, with Flower's FedAvg and a ClientApp that follows FlowerTune.

The template loads the model for every message. Here an actor keeps the model, and each message
writes the adapter into it. With `reload` as the last argument every message loads the model.

Run by `peers.py`: python -m _peer.flower JOB NAME LOOP [reload]
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from _peer.common import LOOPS, Job, Pace, read, write


@functools.cache
def resident(folder: str) -> tuple[Job, Any]:
    """The job and the model of an actor."""
    torch.set_num_threads(1)
    job = Job(folder)
    return job, job.model()


def client_app(folder: str, loop: str, reload: bool) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from _peer import flower as here  # imported by name, so an actor keeps its cache

        job, model = here.resident(folder)
        if reload:
            model = job.model()
        client = int(context.node_config["partition-id"])
        write(model, message.content["arrays"].to_torch_state_dict())
        round_ = int(message.content["config"]["server-round"])
        LOOPS[loop](model, job.batches(client, round_), job)
        metrics = MetricRecord({"num-examples": job.weights[client]})
        arrays = ArrayRecord(read(model))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


class Paced(FedAvg):
    """Flower's FedAvg. A round waits for its request."""

    def __init__(self, pace: Pace, **settings: Any):
        super().__init__(**settings)
        self._pace = pace

    def configure_train(self, *args: Any) -> Any:
        self._pace.wait()
        return super().configure_train(*args)

    def aggregate_train(self, *args: Any) -> Any:
        arrays, metrics = super().aggregate_train(*args)
        if arrays is None:
            sys.exit("no client replied")
        self._pace.done(arrays.to_torch_state_dict())
        return arrays, metrics


def main() -> None:
    folder, name, loop, *rest = sys.argv[1:]
    job = Job(folder)
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        clients = len(job.weights)
        everyone = {"min_train_nodes": clients, "min_available_nodes": clients}
        strategy = Paced(Pace(job, name), fraction_evaluate=0.0, **everyone)
        strategy.start(grid, ArrayRecord(job.adapter), num_rounds=job.rounds)

    run_simulation(
        server,
        client_app(folder, loop, bool(rest)),
        num_supernodes=len(job.weights),
        backend_config={
            "client_resources": {"num_cpus": 1},  # one actor for each core
            "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False},
        },
    )


if __name__ == "__main__":
    main()

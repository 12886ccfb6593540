"""The Flower app of `deploy.py`: FedAvg, and clients that return their download.

This app is the cheapest case for Flower: numpy only, no model, no torch. A client adds a small
number to the arrays and reports its seconds. They are subtracted from the time of the round, as the
training of fedvlm's sites is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    began = time.perf_counter()
    arrays = message.content["arrays"].to_numpy_ndarrays()
    upload = ArrayRecord([array + np.float32(1e-3) for array in arrays])
    about = MetricRecord({"num-examples": 1, "seconds": time.perf_counter() - began})
    return Message(RecordDict({"arrays": upload, "metrics": about}), reply_to=message)


class Timed(FedAvg):
    """Flower's FedAvg. It writes a line at the end of each round."""

    def __init__(self, file: Path, **settings: Any):
        super().__init__(**settings)
        self._file = file

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        good = [reply for reply in replies if reply.has_content()]
        arrays, metrics = super().aggregate_train(server_round, replies)
        line = {
            "round": server_round,
            "time": time.time(),
            "there": max((float(r.content["metrics"]["seconds"]) for r in good), default=0.0),
            "clients": len(good),
            "sent": sum(len(a.data) for a in good[0].content["arrays"].values()) if good else 0,
        }
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return arrays, metrics


@server.main()
def serve(grid: Grid, context: Context) -> None:
    job = json.loads(Path(str(context.run_config["job"])).read_text())
    everyone = {"min_train_nodes": job["clients"], "min_available_nodes": job["clients"]}
    arrays = ArrayRecord([np.zeros(shape, np.float32) for shape in job["shapes"]])
    strategy = Timed(Path(job["rounds_file"]), fraction_evaluate=0.0, **everyone)
    strategy.start(grid, arrays, num_rounds=job["rounds"])

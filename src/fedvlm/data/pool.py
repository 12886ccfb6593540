"""Centralized training on the rows of all clients, the upper reference of a federation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedvlm.settings.sections import Config

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition


def pooled(partition: Partition) -> Partition:
    """Gives each client the training rows of all clients. Held-out rows stay with their client.

    A round then trains one client, no matter which, because each of them has all rows.
    """
    rows = np.concatenate([split.train for split in partition.splits.values()])
    splits = {c: replace(split, train=rows) for c, split in partition.splits.items()}
    return replace(partition, splits=splits)


def as_long(config: Config, clients: int) -> Config:
    """Sets the steps of a round to the number that the clients of a cohort take together.

    The steps of ``train.finish_steps`` are spread over the rounds, because pooled rows have no
    local tuning.
    """
    train = config.train
    if train.local_epochs is not None:
        return config
    cohort = min(train.clients_per_round or clients, clients)
    finish = math.ceil(clients * train.tuning / train.rounds)
    steps = {"local_steps": cohort * (train.local_steps or 5) + finish, "finish_steps": 0}
    return config.model_copy(update={"train": train.model_copy(update=steps)})


def named(rows: Any, partition: Partition) -> Any:
    """Puts the name of a row's client in front of its question."""
    questions = list(rows["question"])
    for client, split in partition.splits.items():
        for row in np.concatenate([split.train, split.val, split.test]):
            questions[int(row)] = f"{client}: {questions[int(row)]}"
    return rows.remove_columns("question").add_column("question", questions)

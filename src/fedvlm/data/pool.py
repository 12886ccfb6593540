"""Centralized training, the upper reference of a federation: all clients' rows in one place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedvlm.settings.sections import Config

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition


def pooled(partition: Partition) -> Partition:
    """The same clients, each with all clients' training rows; what is held out stays theirs.

    A round then trains on one client, whichever it is: it is the place where the rows are.
    """
    rows = np.concatenate([split.train for split in partition.splits.values()])
    splits = {c: replace(split, train=rows) for c, split in partition.splits.items()}
    return replace(partition, splits=splits)


def as_long(config: Config, clients: int) -> Config:
    """Settings for as many steps a round as the clients of a cohort take together."""
    if config.train.local_epochs is not None:
        return config
    cohort = min(config.train.clients_per_round or clients, clients)
    steps = {"local_steps": cohort * (config.train.local_steps or 5)}
    return config.model_copy(update={"train": config.train.model_copy(update=steps)})


def named(rows: Any, partition: Partition) -> Any:
    """The rows with their client's name in front of the question."""
    questions = list(rows["question"])
    for client, split in partition.splits.items():
        for row in np.concatenate([split.train, split.val, split.test]):
            questions[int(row)] = f"{client}: {questions[int(row)]}"
    return rows.remove_columns("question").add_column("question", questions)

"""The protocol: an algorithm is a frozen value of pure functions.

It holds no counter, no random state and no client data, and is cut at the wire: no function sees
both the server's state and a client's data. The style is optax's and fedjax's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedvlm.tree import Select, Tree

State = Tree
"""What the server keeps between rounds: named tensors, so that a checkpoint is one file."""


@dataclass(frozen=True)
class Client:
    """What the server knows of a client.

    Attributes:
        name: its name in the partition.
        weight: its weight in a mean, the number of its training examples.
    """

    name: str
    weight: float


@dataclass(frozen=True)
class Phase:
    """One stretch of local training.

    Attributes:
        trains: takes the names of the factors that are trained; the others are constant.
        steps: optimizer steps, or None for the length that ``train`` in the config says.
    """

    trains: Select
    steps: int | None = None


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm over LoRA factors.

    Attributes:
        init: ``(adapter) -> state``; server, once, from the common initial adapter.
        download: ``(state, client) -> down``; server: what this client is sent.
        start: ``(adapter, down, mine) -> tree``; client: the whole adapter to train or evaluate,
            from the common initial adapter, the download, and what it keeps (empty at first).
        phases: client: what trains, and how long.
        finish: ``(down, end) -> (upload, mine)``; client: what leaves it, what stays.
        update: ``(state, mean) -> state``; server, from the weighted mean of the uploads.
        final: the algorithm of one last round over all clients, for local tuning at the end.
    """

    init: Callable[[Tree], State]
    download: Callable[[State, Client], Tree]
    start: Callable[[Tree, Tree, Tree], Tree]
    phases: tuple[Phase, ...]
    finish: Callable[[Tree, Tree], tuple[Tree, Tree]]
    update: Callable[[State, Tree], State]
    final: Algorithm | None = None

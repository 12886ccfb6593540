"""Stages on the wire: steps between the algorithm of a client and the algorithm of the server.

Each stage has a memory at each client. It is stored beside the state of the algorithm, under names
that begin with ``wire.``. No algorithm sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedvlm.algorithms.base import Visit
from fedvlm.tree import Tree, named, outside, part

HEAD = "wire."


class Pack(Protocol):
    """Client: the message and the stage's next memory.

    ``down`` is the client's download. ``memory`` is empty at first.
    """

    def __call__(self, up: Tree, down: Tree, memory: Tree, visit: Visit) -> tuple[Tree, Tree]: ...


class Open(Protocol):
    """Server: the upload from a message; ValueError for a message that no client can make."""

    def __call__(self, message: Tree, down: Tree) -> Tree: ...


@dataclass(frozen=True)
class Stage:
    """A step between a client's upload and the server.

    Attributes:
        name: the prefix of the names of its memory.
        pack: ``(up, down, memory, visit) -> (message, memory)``; client.
        open: ``(message, down) -> up``; server.
    """

    name: str
    pack: Pack
    open: Open


def packed(
    stages: Sequence[Stage], up: Tree, down: Tree, memory: Mapping[str, Tree], visit: Visit
) -> tuple[Tree, dict[str, Tree]]:
    """An upload after all stages, and their memories by name; an empty upload passes unchanged."""
    if not up:
        return {}, dict(memory)
    after = {}
    for stage in stages:
        up, after[stage.name] = stage.pack(up, down, memory.get(stage.name, {}), visit)
    return up, after


def opened(stages: Sequence[Stage], message: Tree, down: Tree) -> Tree:
    """The upload from a message: all stages undone, in reverse order.

    Raises:
        ValueError: no client can have made the message.
    """
    if message:
        for stage in reversed(stages):
            message = stage.open(message, down)
    return message


def joined(keep: Tree, memory: Mapping[str, Tree]) -> Tree:
    """The stored state of a client: the state of its algorithm, and the memories of the stages."""
    if len(outside(keep, HEAD)) < len(keep):
        taken = next(name for name in keep if name.startswith(HEAD))
        raise ValueError(f"an algorithm may not keep '{taken}': '{HEAD}' names wire stages")
    whole = dict(keep)
    for name, tree in memory.items():
        whole |= named(f"{HEAD}{name}", tree)
    return whole


def parted(stored: Tree) -> tuple[Tree, dict[str, Tree]]:
    """The inverse of :func:`joined`."""
    own = outside(stored, HEAD)
    if len(own) == len(stored):
        return own, {}
    heads = {n.split("/", 1)[0] for n in stored if n.startswith(HEAD)}
    return own, {head.removeprefix(HEAD): part(stored, head) for head in sorted(heads)}

"""A client's round without training: on an adapter that has shapes and no values.

The plan of a run and the form of a message follow from an algorithm alone. Its own functions are
run on tensors of the ``meta`` device; whole numbers keep their values, because later shapes may
depend on them (a client's rank).
"""

from __future__ import annotations

from typing import NamedTuple

from fedvlm.algorithms.base import Algorithm, Local, Score, Sent, Train, Trained, Visit, step
from fedvlm.tree import Tree

PATH = {"A": 1.0, "B": 1.0}


class Rehearsal(NamedTuple):
    """A client's round as it would be.

    Attributes:
        stretches: the requests for training.
        scored: the number of adapters that are scored on validation rows, where there are any.
        sent: what the client sends and keeps; names and shapes are right, values mean nothing.
    """

    stretches: tuple[Train, ...]
    scored: int
    sent: Sent


def rehearse(
    algorithm: Algorithm, initial: Tree, visit: Visit, down: Tree, steps: int
) -> Rehearsal:
    """Runs a client's program and answers without training; the client has kept nothing before.

    Args:
        algorithm: of the run.
        initial: the common initial adapter, or one without values.
        visit: the client and the round.
        down: what the client is sent, with or without values.
        steps: the usual number of steps of a round.
    """
    begin = algorithm.model(initial, down, {})
    program = algorithm.work(Local(visit, begin, down, {}, steps))
    stretches: list[Train] = []
    scored = 0
    ask = step(program)
    while not isinstance(ask, Sent):
        if isinstance(ask, Score):
            scored += len(ask.trees)
            ask = step(program, ())
        else:
            stretches.append(ask)
            ask = step(program, Trained(ask.begin, PATH))
    return Rehearsal(tuple(stretches), scored, ask)


def bare(tree: Tree) -> Tree:
    """The tensors without values, except for whole numbers."""
    return {n: t.to("meta") if t.is_floating_point() else t for n, t in tree.items()}

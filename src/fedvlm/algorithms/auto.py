"""``auto``: every client chooses, round by round, how much of the others it takes.

A client begins a round with one of five mixtures of its own factors and what it was sent: the one
with the lowest loss on its validation rows. They are what simpler algorithms begin with: the
server's factors (lora), its B on the own A (plora), the own B on its A (fedsa), halves of both
(mix), the own factors (local). What it uploads is what it was sent, moved as its own factors have
moved in the round, so that the server's factors take the steps of all clients, wherever these began
them; where all begin at what they were sent, that is FedAvg. After the last round every client
tunes, keeps the running mean of its adapter that has the lowest validation loss, and uses the best
mixture of that and the last download.

It sends what lora sends. A round costs five forward passes over the validation rows besides. How it
was found, and what lost against it: docs/research-log.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedvlm.algorithms.base import Algorithm, Work
from fedvlm.algorithms.mixing import Mix, blend, mixing
from fedvlm.algorithms.sharing import averaged, stopped
from fedvlm.tree import Tree

STARTS: tuple[Mix, ...] = (
    {"A": 1.0, "B": 1.0},
    {"A": 0.0, "B": 1.0},
    {"A": 1.0, "B": 0.0},
    {"A": 0.5, "B": 0.5},
    {"A": 0.0, "B": 0.0},
)


def auto(
    steps: int, checks: int, *, server_lr: float = 1.0, starts: Sequence[Mix] = STARTS
) -> Algorithm:
    """The mean of all steps, with each client's start by validation, and tuning in the end.

    Args:
        steps: of tuning after the last round.
        checks: validations while tuning.
        server_lr: the server moves this far from its state to the clients' mean.
        starts: the mean's part in each factor, of the mixtures that are chosen from.
    """

    def options(adapter: Tree, down: Tree, mine: Tree) -> list[Tree]:
        return [{**adapter, **blend(mix, down, mine)} for mix in starts] if mine else []

    def finish(work: Work) -> tuple[Tree, Tree]:
        moved = {n: t + (work.end[n] - work.start[n]) for n, t in work.down.items()}
        return moved, dict(work.end)

    halves = mixing({"A": 0.5, "B": 0.5}, server_lr=server_lr)
    return stopped(replace(halves, options=options, finish=finish), steps, checks, averaged)

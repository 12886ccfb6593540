"""``auto``: every client chooses, round by round, how much of the others it takes.

A client begins a round with one of five mixtures of its own factors and what it was sent: the one
with the lowest loss on its validation rows. They are what simpler algorithms begin with: the
server's factors (lora), its B on the own A (plora), the own B on its A (fedsa), halves of both
(mix), the own factors (local).

After the last round the server sends the mean of its rounds, the later ones weighing more
(:func:`fedvlm.algorithms.server.late_mean`). Every client chooses and tunes once more, takes the
mean of its adapter over the tuning (stochastic weight averaging, Izmailov et al., arXiv
1803.05407; over its second half, where the client has no factors of its own to begin with), and
uses the best of the same five mixtures of that and what it was sent.

Where less than half of all take part in a round, its clients begin at the server's factors and keep
none: these would be old when they are needed, and what many have trained from is what tunes best in
the end (FedAvg as meta-learning: Jiang et al., arXiv 1909.12488).

It sends what lora sends. A round costs five forward passes over the validation rows besides. How it
was found, and what lost against it: docs/research-log.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from fedvlm.algorithms.base import Algorithm, Client, State, Work
from fedvlm.algorithms.mixing import Mix, blend, mixing
from fedvlm.algorithms.server import late_mean
from fedvlm.algorithms.sharing import reached, stopped
from fedvlm.tree import Mean, Tree, named, part, plain

if TYPE_CHECKING:
    from torch import Tensor

COHORT, TUNED = "cohort", "tuned"
FEW = 0.5  # of all examples: in a round with fewer, a client begins at what it is sent
HALVES: Mix = {"A": 0.5, "B": 0.5}

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
    """FedAvg of both factors, with each client's start by validation, and tuning in the end.

    Args:
        steps: of tuning after the last round.
        checks: points of the tuning, evenly spaced, that count in its mean besides its start.
        server_lr: the server moves this far from its state to the clients' mean.
        starts: the mean's part in each factor, of the mixtures that are chosen from.
    """
    halves = mixing(HALVES, server_lr=server_lr)

    def download(state: State, client: Client) -> Tree:
        told = named(COHORT, {"few": _flag(client.sampled < FEW)})
        return {**halves.download(state, client), **told}

    def start(adapter: Tree, down: Tree, mine: Tree) -> Tree:
        own = {} if few(down) else mine
        return {**adapter, **(part(mine, TUNED) or blend(HALVES, plain(down), own))}

    def finish(work: Work) -> tuple[Tree, Tree]:
        return dict(work.end), {} if few(work.down) else dict(work.end)

    def options(adapter: Tree, down: Tree, mine: Tree) -> list[Tree]:
        if not mine or part(mine, TUNED) or few(down):
            return []
        return [{**adapter, **tree} for tree in mixtures(down, mine)]

    def mixtures(down: Tree, own: Tree) -> list[Tree]:
        return [blend(mix, plain(down), own) for mix in starts]

    def tried(work: Work) -> list[Tree]:
        points, mean = reached(work), Mean()
        near = bool(plain(work.mine))  # with nothing of its own, a client begins far from its end
        for point in points if near else points[len(points) // 2 :]:
            mean.add(point, 1.0)
        return mixtures(work.down, mean.tree())

    choosing = replace(halves, download=download, start=start, finish=finish, options=options)
    last = stopped(choosing, steps, checks, tried).final
    assert last is not None

    def ended(work: Work) -> tuple[Tree, Tree]:
        upload, mine = last.finish(work)
        return upload, named(TUNED, mine)

    return late_mean(replace(choosing, final=replace(last, finish=ended)))


def few(down: Tree) -> bool:
    """Whether the client was sent this with less than half of all."""
    return bool(part(down, COHORT)["few"])


@cache
def _flag(value: bool) -> Tensor:
    """One object for one value: clients that are sent the same share its bytes."""
    import torch

    return torch.tensor(value)

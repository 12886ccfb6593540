"""``auto``: every client chooses, now and then, how much of the others it takes.

A client begins a round with one of five mixtures of its own factors and what it was sent. They are
what simpler algorithms begin with: the server's factors (lora), its B on the own A (plora), the own
B on its A (fedsa), halves of both (mix), the own factors (local). In its second round, and in every
third of its rounds from then on, it takes the one with the lowest loss on its validation rows, and
in the two that follow the same one again.

After the last round the server sends the mean of its rounds, the later ones weighing more
(:func:`fedvlm.algorithms.server.late_mean`). Every client chooses once more, tunes, takes the mean
of its adapter over the tuning (stochastic weight averaging, Izmailov et al., arXiv 1803.05407), and
uses the best of the same five mixtures of that and what it was sent.

Where less than half of all take part in a round, its clients begin at the server's factors and keep
none: these would be old when they are needed, and what many have trained from is what tunes best in
the end (FedAvg as meta-learning: Jiang et al., arXiv 1909.12488). A client with no factors of its
own begins its tuning far from where it ends: the mean is over the second half, and the client uses
it or what it was sent, whichever is wrong less often on its validation rows. The loss would prefer
what it was sent, which is less sure of itself, where that is never right.

It sends what lora sends. A choice costs five forward passes over the validation rows. How it was
found, and what lost against it: docs/research-log.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from fedvlm.algorithms.base import Algorithm, Client, State, Validation, Work
from fedvlm.algorithms.mixing import Mix, blend, mixing
from fedvlm.algorithms.server import late_mean
from fedvlm.algorithms.sharing import reached, stopped
from fedvlm.tree import Mean, Tree, named, part, plain

if TYPE_CHECKING:
    from torch import Tensor

COHORT, CHOSEN, TUNED = "cohort", "chosen", "tuned"
EVERY = 3  # of a client's rounds: it chooses again
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

    def mixtures(down: Tree, own: Tree) -> list[Tree]:
        return [blend(mix, plain(down), own) for mix in starts]

    def start(adapter: Tree, down: Tree, mine: Tree) -> Tree:
        own, mix = {} if few(down) else plain(mine), HALVES
        if last := part(mine, CHOSEN):
            mix = starts[int(last["start"])]
        return {**adapter, **(part(mine, TUNED) or blend(mix, plain(down), own))}

    def options(adapter: Tree, down: Tree, mine: Tree) -> list[Tree]:
        if not plain(mine) or few(down):
            return []
        return [{**adapter, **tree} for tree in mixtures(down, plain(mine))]

    def options_when_due(adapter: Tree, down: Tree, mine: Tree) -> list[Tree]:
        last = part(mine, CHOSEN)
        return [] if last and last["rounds"] < EVERY else options(adapter, down, mine)

    def finish(work: Work) -> tuple[Tree, Tree]:
        if few(work.down):
            return dict(work.end), {}
        last = part(work.mine, CHOSEN)
        if work.chosen is not None:
            last = {"start": _number(work.chosen), "rounds": _number(0)}
        if last:
            last["rounds"] = last["rounds"] + 1
        return dict(work.end), {**work.end, **named(CHOSEN, last)}

    def tried(work: Work) -> list[Tree]:
        points, mean, own = reached(work), Mean(), plain(work.mine)
        for point in points if own else points[len(points) // 2 :]:
            mean.add(point, 1.0)
        return mixtures(work.down, mean.tree()) if own else [plain(work.down), mean.tree()]

    def merit(work: Work, found: Validation) -> tuple[float, ...]:
        return (found.loss,) if plain(work.mine) else (found.wrong, found.loss)

    choosing = replace(halves, download=download, start=start, finish=finish, options=options)
    last = stopped(choosing, steps, checks, tried, merit=merit, resumes=True).final
    assert last is not None

    def ended(work: Work) -> tuple[Tree, Tree]:
        upload, mine = last.finish(work)
        return upload, named(TUNED, mine)

    rounds = replace(choosing, options=options_when_due)
    return late_mean(replace(rounds, final=replace(last, finish=ended)))


def few(down: Tree) -> bool:
    """Whether the client was sent this with less than half of all."""
    return bool(part(down, COHORT)["few"])


@cache
def _flag(value: bool) -> Tensor:
    """One object for one value: clients that are sent the same share its bytes."""
    import torch

    return torch.tensor(value)


def _number(value: int) -> Tensor:
    import torch

    return torch.tensor(value)

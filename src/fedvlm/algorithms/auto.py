"""``auto``: every client chooses, now and then, how much of the others it takes.

A client begins a round with one of five mixtures of its own factors and the download. Simpler
algorithms begin with the same ones: the server's factors (lora), its B on the own A (plora), the
own B on its A (fedsa), halves of both (mix), the own factors (local). The client takes the mixture
of the lowest loss on its validation rows in its second round, and in every third round from then
on. In the two rounds that follow it takes the same mixture again.

After the last round the server sends the mean of its rounds, the later ones weighing more
(:func:`fedvlm.algorithms.server.late_mean`). Every client chooses once more and tunes. It takes the
mean of its adapter over the tuning (stochastic weight averaging, Izmailov et al., arXiv 1803.05407)
and ends with the best of the same five mixtures of that mean and the download.

Where less than half of all examples take part in a round, its clients begin at the download and
keep no factors. Their factors would be old when they are needed, and a model that many have trained
from tunes best in the end (FedAvg as meta-learning: Jiang et al., arXiv 1909.12488). A client
without factors of its own begins its tuning far from where it ends. It takes the mean over the
second half, and ends with that mean or the download: the one that is wrong less often on its
validation rows. The loss would prefer the download, which is less sure of itself, even where the
download is never right.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from fedvlm.algorithms.averaging import ServerStep
from fedvlm.algorithms.base import Algorithm, Local, Program, Score, Sent, Train, Validation
from fedvlm.algorithms.mixing import Mix, blend, mixing
from fedvlm.algorithms.server import late_mean
from fedvlm.algorithms.tuning import CheckedTuning, best, lowest_loss, stretches
from fedvlm.tree import Mean, Tree, named, part, plain

CHOSEN, TUNED = "chosen", "tuned"
EVERY = 3  # of a client's rounds: it chooses again
FEW = 0.5  # of all examples: in a round with fewer, a client begins at the download
HALVES: Mix = {"A": 0.5, "B": 0.5}

STARTS: tuple[Mix, ...] = (
    {"A": 1.0, "B": 1.0},
    {"A": 0.0, "B": 1.0},
    {"A": 1.0, "B": 0.0},
    {"A": 0.5, "B": 0.5},
    {"A": 0.0, "B": 0.0},
)


class AutoConfig(ServerStep, CheckedTuning):
    """Settings of ``auto``."""


def auto(
    steps: int, checks: int, *, server_lr: float = 1.0, starts: Sequence[Mix] = STARTS
) -> Algorithm:
    """FedAvg of both factors, with each client's start by validation, and tuning in the end.

    Args:
        steps: of tuning after the last round.
        checks: points of the tuning, evenly spaced, that count in its mean besides its start.
        server_lr: length of the server's step to the clients' mean; 1 reaches it.
        starts: the mean's part in each factor, for each mixture that is chosen from.
    """

    def model(initial: Tree, down: Tree, mine: Tree) -> Tree:
        last = part(mine, CHOSEN)
        mix = starts[int(last["start"])] if last else HALVES
        return {**initial, **(part(mine, TUNED) or blend(mix, plain(down), plain(mine)))}

    def mixtures(local: Local, own: Tree) -> list[Tree]:
        found = [blend(mix, plain(local.down), own) for mix in starts]
        return [{**local.begin, **tree} for tree in found]

    def choose(local: Local) -> Program:
        """The work of a round: may choose a mixture, then trains it."""
        if local.visit.sampled < FEW:
            end, _ = yield Train({**local.begin, **plain(local.down)})
            return Sent(end)
        begin, last = local.begin, part(local.mine, CHOSEN)
        if plain(local.mine) and not (last and last["rounds"] < EVERY):
            begin, last = yield from chosen(local, last)
        end, _ = yield Train(begin)
        if last:
            last = {**last, "rounds": last["rounds"] + 1}
        return Sent(end, {**end, **named(CHOSEN, last)})

    def chosen(local: Local, last: Tree) -> Generator[Score, Any, tuple[Tree, Tree]]:
        """The mixture of the lowest validation loss, and its number; as before without rows."""
        import torch

        options = mixtures(local, plain(local.mine))
        losses = [lowest_loss(found) for found in (yield Score(options))]
        if not losses:
            return local.begin, last
        first = min(range(len(losses)), key=losses.__getitem__)
        return options[first], {"start": torch.tensor(first), "rounds": torch.tensor(0)}

    def tune(local: Local) -> Program:
        """The work of the final round."""
        own, begin = plain(local.mine), local.begin
        if own:
            begin, _ = yield from chosen(local, {})
        points = yield from stretches(begin, steps, checks, resume=True)
        mean = Mean()
        for point in points if own else points[len(points) // 2 :]:
            mean.add(point, 1.0)
        if own:
            end = yield from best(mixtures(local, mean.tree()))
        else:
            end = yield from best([plain(local.down), mean.tree()], wrong_less_often)
        return Sent({}, named(TUNED, dict(end)))

    def work(local: Local) -> Program:
        return (yield from (tune if local.visit.final else choose)(local))

    halves = mixing(HALVES, server_lr=server_lr)
    return late_mean(replace(halves, model=model, work=work, final=True))


def wrong_less_often(found: Validation) -> tuple[float, ...]:
    """The order of adapters by wrong answers, then by loss."""
    return found.wrong, found.loss

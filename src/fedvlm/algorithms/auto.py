"""``auto``: every client chooses its own mixture of personal and shared factors.

A client begins a round with one of five mixtures of its factors and the download. Each mixture is
the start of a simpler algorithm: the download (lora), the download's B on the client's A (plora),
the client's B on the download's A (fedsa), halves of both (mix), the client's factors (local). In
its second round, and in every third round from then on, the client chooses the mixture of the
lowest loss on its validation rows. In the two rounds after a choice, it uses the same mixture.

After the last round, the server sends a mean of its states over the rounds, with larger weights
for later rounds (:func:`fedvlm.algorithms.server.late_mean`). Every client chooses once more and
tunes. It averages its adapter over the tuning (stochastic weight averaging, Izmailov et al., arXiv
1803.05407), and ends with the best of the same five mixtures of this average and the download.

If the cohort of a round has less than half of all examples, its clients begin at the download and
keep no factors. Kept factors would be outdated at their next use. Besides, a model from which many
clients have trained is the best start for tuning (FedAvg as meta-learning: Jiang et al., arXiv
1909.12488).

A client without kept factors begins its tuning far from the end of the tuning. So it averages over
the second half of the tuning. It ends with this average or with the download, whichever gives fewer
wrong answers on its validation rows. The loss is no criterion here: it prefers the download, which
is less confident, even where the download is never right.
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
EVERY = 3  # rounds of a client from one choice to the next
FEW = 0.5  # share of all examples: in rounds with a smaller share, clients begin at the download
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
    """FedAvg of both factors, with each client's start chosen by validation, and final tuning.

    Args:
        steps: optimizer steps of tuning after the last round.
        checks: number of evenly spaced points of the tuning that are averaged with its start.
        server_lr: step of the server towards the clients' mean; 1 reaches it.
        starts: the mixtures to choose from: the share of the download in each factor.
    """

    def model(initial: Tree, down: Tree, mine: Tree) -> Tree:
        last = part(mine, CHOSEN)
        mix = starts[int(last["start"])] if last else HALVES
        return {**initial, **(part(mine, TUNED) or blend(mix, plain(down), plain(mine)))}

    def mixtures(local: Local, own: Tree) -> list[Tree]:
        found = [blend(mix, plain(local.down), own) for mix in starts]
        return [{**local.begin, **tree} for tree in found]

    def choose(local: Local) -> Program:
        """The work of a round: chooses a mixture if due, then trains from it."""
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
        """The mixture of the lowest validation loss, and the memory of this choice.

        Without validation rows, the start of the round and the former memory.
        """
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
    """A key that sorts adapters by wrong answers, then by loss."""
    return found.wrong, found.loss

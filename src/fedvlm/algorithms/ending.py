"""The ending of a run, the same for every algorithm: averaging over the rounds, and local tuning.

Every client averages its model over the rounds (``train.average``): its model at the start of each
round, and at the end. Then it tunes this average on its own rows for ``train.finish_steps``
optimizer steps, and uses the mean of the start and of :data:`POINTS` evenly spaced points
(stochastic weight averaging, Izmailov et al., arXiv 1803.05407). Nothing is sent.

- ``mean``: round ``t`` of ``T`` has the weight ``(t / T) ** 3``, approximately: polynomial-decay
  averaging, Shamir and Zhang, arXiv 1212.1824. The last quarter of the rounds has most of the
  weight, whatever the number of rounds.
- ``ema``: an exponential moving average; each round moves it by :data:`EMA`.
- ``none``: the last model, and the last point of the tuning. FedAvg with tuning is then the
  baseline "FedAvg + FT" of Cheng et al., arXiv 2108.07313.

A client's model stands for the rounds since the client's previous visit.

An algorithm with a final round of its own (:class:`fedvlm.algorithms.base.Algorithm`, ``final``)
keeps that round. Its usual number of steps there is ``train.finish_steps``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from fedvlm.algorithms.base import Algorithm, Local, Program, Score, Sent, Train, everything
from fedvlm.settings.train import TrainConfig
from fedvlm.tree import Mean, Select, Tree, named, number, outside, part

HEAD = "ending."  # of the names of all tensors that belong to the ending
TUNED, AVERAGE, ROUND = f"{HEAD}tuned", f"{HEAD}average", f"{HEAD}round"
POINTS = 5  # of a tuning that are averaged, besides its start
POWER = 3
EMA = 0.2

WEIGHTS: dict[str, Callable[[int], float]] = {
    "mean": lambda t: (POWER + 1) / (t + POWER),
    "ema": lambda t: EMA if t > 1 else 1.0,
}
"""Kind of average -> the weight of the model after round ``t``, in an average of rounds 1 to t."""


def ended(algorithm: Algorithm, train: TrainConfig) -> Algorithm:
    """``algorithm`` with the ending of a run.

    Args:
        algorithm: any algorithm.
        train: the kind of the average, and the number of steps of tuning.
    """
    kind, steps = train.average, train.tuning
    if algorithm.final or (kind == "none" and not steps):
        return algorithm

    def model(initial: Tree, down: Tree, mine: Tree) -> Tree:
        if tuned := part(mine, TUNED):
            return {**initial, **tuned}
        return algorithm.model(initial, down, without(mine))

    def work(local: Local) -> Program:
        average = {} if kind == "none" else averaged(local, WEIGHTS[kind])
        if not local.visit.final:
            sent = yield from algorithm.work(replace(local, mine=without(local.mine)))
            return Sent(sent.up, {**sent.keep, **average})
        begin = part(average, AVERAGE) or local.begin
        points = yield from stretches(begin, steps, POINTS, resume=True)
        tuned = points[-1] if kind == "none" else averages(points)[-1]
        return Sent({}, {**without(local.mine), **named(TUNED, tuned)})

    return replace(algorithm, model=model, work=work, final=True)


def without(mine: Tree) -> Tree:
    """A client's kept tensors without those of the ending."""
    return outside(mine, HEAD)


def averaged(local: Local, weight: Callable[[int], float]) -> Tree:
    """The kept average after the rounds before this one; empty before the end of round 1.

    Args:
        local: the client at the start of a round.
        weight: the weight of the model after round ``t``.
    """
    ended_rounds, mean = local.visit.round - 1, part(local.mine, AVERAGE)
    if not ended_rounds:
        return {}
    last, rest = (int(local.mine[ROUND]) if mean else 0), 1.0
    for t in range(last + 1, ended_rounds + 1):
        rest *= 1 - weight(t)
    new = local.begin
    if mean:
        import torch

        ends = [new[name] for name in mean]
        moved = torch._foreach_lerp(list(mean.values()), ends, 1 - rest)
        new = dict(zip(mean, moved, strict=True))
    return {**named(AVERAGE, new), ROUND: number(ended_rounds)}


def stretches(
    begin: Tree, steps: int, checks: int, trains: Select = everything, *, resume: bool = False
) -> Generator[Train, Any, list[Tree]]:
    """Trains for ``steps`` in ``checks`` stretches; returns the start and the end of each stretch.

    Args:
        begin: the whole adapter at the start.
        steps: optimizer steps of all stretches together.
        checks: the number of stretches; stretches without steps are left out.
        trains: selects the factors that are trained.
        resume: whether the stretches share one optimizer.
    """
    whole, rest = divmod(steps, checks)
    points = [begin]
    for length in [whole + (n < rest) for n in range(min(checks, steps))]:
        going = resume and len(points) > 1
        end, _ = yield Train(points[-1], trains, length, resume=going)
        points.append(end)
    return points


def best(trees: Sequence[Tree]) -> Generator[Score, Any, Tree]:
    """The adapter of the lowest validation loss; without validation rows, the last."""
    losses = [found.loss for found in (yield Score(trees))]
    return trees[min(range(len(losses)), key=losses.__getitem__, default=-1)]


def averages(points: Sequence[Tree]) -> list[Tree]:
    """For each point, the mean of this and all earlier points: stochastic weight averaging."""
    folded, found = Mean(), []
    for tree in points:
        folded.add(tree, 1.0)
        found.append(folded.tree())
    return found

"""Local tuning at the end of a run: FedAvg + FT, the baseline of arXiv 2108.07313.

Tuning takes a fixed number of steps, or stops early by the client's validation rows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from fedvlm.algorithms.averaging import Averaging
from fedvlm.algorithms.base import (
    Algorithm,
    Local,
    Program,
    Score,
    Sent,
    Train,
    Validation,
    everything,
)
from fedvlm.settings.method import AlgorithmConfig, Positive
from fedvlm.tree import Mean, Select, Tree


class Tuning(AlgorithmConfig):
    """Length of the tuning after the last round."""

    ft_steps: Positive = Field(
        20, description="optimizer steps of local tuning after the last round"
    )


class CheckedTuning(Tuning):
    """Length of the tuning, and the number of its points."""

    ft_checks: Positive = Field(
        5, description="lora+es: validations during ft_steps; auto: averaged points of the tuning"
    )


class TunedConfig(Averaging, Tuning):
    """Settings of ``lora+ft``."""


class StoppedConfig(Averaging, CheckedTuning):
    """Settings of ``lora+es``."""


def tuned(algorithm: Algorithm, steps: int) -> Algorithm:
    """``algorithm``, then ``steps`` of local tuning of all factors; the tuned models stay local."""

    def tune(local: Local) -> Program:
        end, _ = yield Train(local.begin, steps=steps)
        return Sent({}, end)

    return ending(algorithm, tune)


def stopped(algorithm: Algorithm, steps: int, checks: int) -> Algorithm:
    """``algorithm``, then local tuning of all factors that stops early.

    Tuning takes ``steps`` in ``checks`` stretches, each with a fresh optimizer. The client keeps
    the point of the lowest validation loss. Without validation rows, it keeps the last point.
    """

    def tune(local: Local) -> Program:
        points = yield from stretches(local.begin, steps, checks)
        return Sent({}, dict((yield from best(points))))

    return ending(algorithm, tune)


def ending(algorithm: Algorithm, tune: Callable[[Local], Program]) -> Algorithm:
    """``algorithm`` with ``tune`` as the work of a final round."""

    def work(local: Local) -> Program:
        return (yield from (tune if local.visit.final else algorithm.work)(local))

    return replace(algorithm, work=work, final=True)


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


def lowest_loss(found: Validation) -> tuple[float, ...]:
    """A key that sorts adapters by validation loss."""
    return (found.loss,)


def best(
    trees: Sequence[Tree], merit: Callable[[Validation], tuple[float, ...]] = lowest_loss
) -> Generator[Score, Any, Tree]:
    """The adapter with the lowest ``merit`` on validation rows; without such rows, the last."""
    merits = [merit(found) for found in (yield Score(trees))]
    return trees[min(range(len(merits)), key=merits.__getitem__, default=-1)]


def averages(points: Sequence[Tree]) -> list[Tree]:
    """For each point, the mean of this and all earlier points: stochastic weight averaging.

    Izmailov et al., arXiv 1803.05407.
    """
    mean, found = Mean(), []
    for tree in points:
        mean.add(tree, 1.0)
        found.append(mean.tree())
    return found

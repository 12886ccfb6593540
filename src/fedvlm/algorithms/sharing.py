"""Algorithms that differ only in which factors are shared: one map from modules to factors.

- FedVLM's personalized LoRA (pLoRA), arXiv 2507.17088: share B, keep A.
- FedIT / FedAvg of LoRA, arXiv 2305.05644: share A and B.
- FedSA-LoRA, arXiv 2410.01463: share A, keep B.
- FFA-LoRA, arXiv 2403.12313: A frozen at its common start, share B.
- Fed-ALoRA, arXiv 2509.25414: share B, keep A. With equal ranks that is pLoRA's map, so the name
  is an alias; its decomposition of B for unequal ranks is not here.
- RoLoRA, arXiv 2502.01755: B is trained and shared in odd rounds, A in even ones.
- IAT, arXiv 2606.08687: factors are personal in the image encoder and in the decoder, other ones in
  each. Only the abstract was at hand: that the encoder keeps A and the decoder B is our reading of
  it, the projector counts as encoder, and its orthogonality regularizer is not here.
- Local training: share nothing.
- FedAvg with local tuning at the end, the baseline of arXiv 2108.07313 (FedAvg + FT), for a number
  of steps or stopped early on validation rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fedvlm.algorithms.base import Algorithm, Phase, State, Validation, Work
from fedvlm.layers import select
from fedvlm.tree import Mean, Select, Tree, factor, split, step

IAT = {"part:language": "A", "": "B"}


def sharing(share: Mapping[str, str], *, train: str = "AB", server_lr: float = 1.0) -> Algorithm:
    """The algorithm that aggregates the factors a map names, and keeps the other trained ones.

    Args:
        share: pattern over module names (see :func:`matcher`) -> ``"A"``, ``"B"``, ``"AB"`` or
            ``"none"``. The first pattern that a module fits decides; a module that none fits
            shares nothing.
        train: the factors that are trained at all.
        server_lr: the server moves this far from its state to the clients' mean.
    """
    shared = select(share)

    def trained(name: str) -> bool:
        return factor(name) in train

    def uploads(name: str) -> bool:
        return trained(name) and shared(name)

    def keeps(name: str) -> bool:
        return trained(name) and not shared(name)

    def update(state: State, mean: Tree) -> State:
        return {**state, **step({n: state[n] for n in mean}, mean, server_lr)}

    return Algorithm(
        init=lambda adapter: split(adapter, uploads)[0],
        download=lambda state, client: state,
        start=lambda adapter, down, mine: {**adapter, **down, **mine},
        phases=(Phase(trained),),
        finish=lambda work: (split(work.end, uploads)[0], split(work.end, keeps)[0]),
        update=update,
    )


def alternating(*, server_lr: float = 1.0) -> Algorithm:
    """One factor a round is trained and sent, B first; every client is sent both."""
    both = sharing({"": "AB"}, server_lr=server_lr)

    def turn(trained: str) -> Algorithm:
        one = sharing({"": "AB"}, train=trained, server_lr=server_lr)
        return replace(one, init=both.init)

    return replace(turn("B"), turns=(turn("B"), turn("A")))


def everything(name: str) -> bool:
    """Takes every factor."""
    return True


def tuned(algorithm: Algorithm, steps: int) -> Algorithm:
    """``algorithm``, then ``steps`` of local tuning of all factors; the results stay local."""
    last = replace(
        algorithm,
        phases=(Phase(everything, steps=steps),),
        finish=lambda work: ({}, dict(work.end)),
        update=lambda state, mean: state,
    )
    return replace(algorithm, final=last)


def reached(work: Work) -> list[Tree]:
    """A client's adapter before its phases and after each."""
    return [work.start, *work.ends]


def averaged(work: Work) -> list[Tree]:
    """The same, each the mean of itself and those before: stochastic weight averaging.

    Izmailov et al., arXiv 1803.05407.
    """
    mean, found = Mean(), []
    for tree in reached(work):
        mean.add(tree, 1.0)
        found.append(mean.tree())
    return found


def means_and_points(work: Work) -> list[Tree]:
    """Both: means where tuning is short, and points where the start has to be left behind."""
    return [*averaged(work), *work.ends]


def lowest_loss(work: Work, found: Validation) -> tuple[float, ...]:
    """What :func:`stopped` goes by unless told otherwise."""
    return (found.loss,)


def stopped(
    algorithm: Algorithm,
    steps: int,
    checks: int,
    tried: Callable[[Work], Sequence[Tree]] = reached,
    trains: Select = everything,
    *,
    merit: Callable[[Work, Validation], tuple[float, ...]] = lowest_loss,
    resumes: bool = False,
) -> Algorithm:
    """``algorithm``, then local tuning of all factors, or of those it ``trains``, that stops early.

    It goes on for ``steps`` in ``checks`` stretches, each with an optimizer of its own unless it
    ``resumes`` that of the one before, and keeps of those ``tried`` the adapter of the lowest
    ``merit`` on validation rows; the last, without such rows.
    """
    whole, rest = divmod(steps, checks)
    lengths = [whole + (n < rest) for n in range(checks)]

    def best(work: Work) -> Tree:
        merits = [merit(work, found) for found in work.scores]
        return dict(tried(work)[min(range(len(merits)), key=merits.__getitem__, default=-1)])

    tuning = tuned(algorithm, steps).final
    assert tuning is not None
    last = replace(
        tuning,
        phases=tuple(Phase(trains, steps=n, resumes=resumes) for n in lengths if n),
        finish=lambda work: ({}, split(best(work), trains)[0]),
        tried=tried,
    )
    return replace(algorithm, final=last)

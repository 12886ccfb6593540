"""Personal models between a client's own and the shared one.

- Interpolation: before a round, each factor is ``(1 - mix) * own + mix * mean``. With ``mix`` 1 for
  both factors that is FedAvg, with 0 for A and 1 for B it is pLoRA, with 0 for both local training.
- Ditto, Li et al., arXiv 2012.04221, algorithm 1: the shared model is FedAvg's, and a personal one
  is trained beside it, pulled to the download by ``mu / 2 * |v - w|^2``. A client's personal model
  begins as its first download. Both are trained for the length of a round.
- APFL, Deng et al., arXiv 2003.13461, with a fixed mixture (the paper also has an adaptive one):
  the client's model is ``mix * w + (1 - mix) * v``, w shared and v own. The paper alternates steps
  of w and v; here a round trains w first, and then the mixture with w as downloaded, factor by
  factor, which for SGD is v's own step with its learning rate divided by ``(1 - mix)^2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedvlm.algorithms.base import Algorithm, Phase, Work
from fedvlm.algorithms.client_terms import towards_download
from fedvlm.algorithms.sharing import everything, sharing
from fedvlm.tree import Tree, factor, split

Mix = Mapping[str, float]
"""The mean's part in a client's model, by factor (A, B)."""


def mixing(mix: Mix, *, server_lr: float = 1.0) -> Algorithm:
    """Every round begins between the client's own factors and the mean of all."""
    both = sharing({"": "AB"}, server_lr=server_lr)

    def uploads(name: str) -> bool:
        return mix[factor(name)] > 0

    def keeps(name: str) -> bool:
        return mix[factor(name)] < 1

    return replace(
        both,
        init=lambda adapter: split(adapter, uploads)[0],
        start=lambda adapter, down, mine: {**adapter, **blend(mix, down, mine)},
        finish=lambda work: (split(work.end, uploads)[0], split(work.end, keeps)[0]),
    )


def ditto(mu: float, *, server_lr: float = 1.0) -> Algorithm:
    """A shared model, and a personal one that is pulled to it."""
    return replace(
        sharing({"": "AB"}, server_lr=server_lr),
        phases=(
            _shared(),
            Phase(
                everything,
                begin=lambda down, mine, now: {**now, **down, **mine},
                terms=(towards_download(mu),),
            ),
        ),
        finish=lambda work: (dict(work.ends[0]), dict(work.end)),
    )


def apfl(mix: Mix, *, server_lr: float = 1.0) -> Algorithm:
    """A shared model, and a mixture of it with an own one."""

    def finish(work: Work) -> tuple[Tree, Tree]:
        own = {}
        for name, mixed in work.end.items():
            shared = mix[factor(name)]
            own[name] = (mixed - shared * work.down[name]) / (1 - shared)
        return dict(work.ends[0]), own

    return replace(
        sharing({"": "AB"}, server_lr=server_lr),
        start=lambda adapter, down, mine: {**adapter, **blend(mix, down, mine)},
        phases=(
            _shared(),
            Phase(
                everything,
                begin=lambda down, mine, now: {**now, **blend(mix, down, mine)},
            ),
        ),
        finish=finish,
    )


def blend(mix: Mix, down: Tree, mine: Tree) -> Tree:
    """``mix * down + (1 - mix) * mine``; the one there is, where there is only one."""
    mixed = {**down, **mine}
    for name in down.keys() & mine.keys():
        shared = mix[factor(name)]
        mixed[name] = shared * down[name] + (1 - shared) * mine[name]
    return mixed


def _shared() -> Phase:
    return Phase(everything, begin=lambda down, mine, now: {**now, **down})

"""Personal models between a client's own factors and the shared factors.

- Interpolation: before a round, each factor is ``(1 - mix) * own + mix * mean``. With ``mix`` 1 for
  both factors this is FedAvg, with 0 for A and 1 for B it is pLoRA, with 0 for both it is local
  training.
- Ditto, Li et al., arXiv 2012.04221, algorithm 1: the shared model is that of FedAvg. A personal
  model is trained beside it, pulled to the download by ``mu / 2 * |v - w|^2``. The personal model
  begins at the client's first download. Both models are trained for the length of a round.
- APFL, Deng et al., arXiv 2003.13461, with a fixed mixture (the paper also has an adaptive
  mixture): the client's model is ``mix * w + (1 - mix) * v``, with w shared and v personal. The
  paper alternates steps of w and v. Here a round first trains w. Then it trains the mixture with
  the downloaded w, factor by factor. For SGD, this equals the steps of v with the learning rate
  divided by ``(1 - mix)^2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from fedvlm.algorithms.averaging import ServerStep
from fedvlm.algorithms.base import Algorithm, Local, Program, Sent, Train
from fedvlm.algorithms.client_terms import towards
from fedvlm.algorithms.sharing import sharing
from fedvlm.settings.method import Fraction
from fedvlm.tree import Tree, factor, split

Mix = Mapping[str, float]
"""The share of the mean in a client's model, by factor (A, B)."""


class MixConfig(ServerStep):
    """Settings of ``mix`` and ``apfl``."""

    mix_a: Fraction = Field(0.5, description="share of the mean in a client's A, 0 to 1")
    mix_b: Fraction = Field(0.5, description="share of the mean in a client's B, 0 to 1")

    @property
    def mix(self) -> Mix:
        """The share of the mean in a client's factors."""
        return {"A": self.mix_a, "B": self.mix_b}


class DittoConfig(ServerStep):
    """Settings of ``ditto``."""

    prox_mu: Annotated[float, Field(ge=0)] = Field(
        0.1, description="pull of the personal model towards the download; 0: none"
    )


def mixing(mix: Mix, *, server_lr: float = 1.0) -> Algorithm:
    """Every round begins between the client's own factors and the mean of all clients."""
    both = sharing({"": "AB"}, server_lr=server_lr)

    def uploads(name: str) -> bool:
        return mix[factor(name)] > 0

    def keeps(name: str) -> bool:
        return mix[factor(name)] < 1

    def work(local: Local) -> Program:
        end, _ = yield Train(local.begin)
        return Sent(split(end, uploads)[0], split(end, keeps)[0])

    return replace(
        both,
        init=lambda initial: split(initial, uploads)[0],
        model=lambda initial, down, mine: {**initial, **blend(mix, down, mine)},
        work=work,
    )


def ditto(mu: float, *, server_lr: float = 1.0) -> Algorithm:
    """A shared model, and a personal model that is pulled to it."""

    def work(local: Local) -> Program:
        shared, _ = yield Train({**local.begin, **local.down})
        own = {**shared, **local.down, **local.mine}
        end, _ = yield Train(own, terms=(towards(local.down, mu),))
        return Sent(shared, end)

    return replace(sharing({"": "AB"}, server_lr=server_lr), work=work)


def apfl(mix: Mix, *, server_lr: float = 1.0) -> Algorithm:
    """A shared model, and its mixture with a personal model."""

    def work(local: Local) -> Program:
        shared, _ = yield Train({**local.begin, **local.down})
        end, _ = yield Train({**shared, **blend(mix, local.down, local.mine)})
        own = {}
        for name, mixed in end.items():
            part = mix[factor(name)]
            own[name] = (mixed - part * local.down[name]) / (1 - part)
        return Sent(shared, own)

    return replace(
        sharing({"": "AB"}, server_lr=server_lr),
        model=lambda initial, down, mine: {**initial, **blend(mix, down, mine)},
        work=work,
    )


def blend(mix: Mix, down: Tree, mine: Tree) -> Tree:
    """``mix * down + (1 - mix) * mine``; a factor in only one of the two is unchanged."""
    import torch

    mixed = {**down, **mine}
    for kind, shared in mix.items():
        names = [name for name in mine if name in down and factor(name) == kind]
        if names and shared == 1:
            mixed |= {name: down[name] for name in names}
        elif names and shared:
            parts = torch._foreach_mul([down[name] for name in names], shared)
            torch._foreach_add_(parts, torch._foreach_mul([mine[n] for n in names], 1 - shared))
            mixed |= zip(names, parts, strict=True)
    return mixed

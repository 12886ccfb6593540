"""Algorithms that differ only in the shared factors: a map from modules to factors.

- FedVLM's personalized LoRA (pLoRA), arXiv 2507.17088: share B, keep A.
- FedIT / FedAvg of LoRA, arXiv 2305.05644: share A and B.
- FedSA-LoRA, arXiv 2410.01463: share A, keep B.
- FFA-LoRA, arXiv 2403.12313: A frozen at its common start, share B.
- Fed-ALoRA, arXiv 2509.25414: share B, keep A. With equal ranks this is the map of pLoRA, so both
  names give the same algorithm. The paper's decomposition of B for unequal ranks is not
  implemented.
- RoLoRA, arXiv 2502.01755: B is trained and shared in odd rounds, A in even rounds.
- IAT, arXiv 2606.08687, segments medical images: the encoder keeps A and shares B, the decoder
  keeps B and shares A. The transfer to a vision-language model is ours: the image side and the
  projector take the encoder's map, the language model takes the decoder's. The paper's
  orthogonality regularizer is not implemented. Known from the abstract and a summary.
- Local training: share nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from pydantic import Field, field_validator

from fedvlm.algorithms.averaging import Averaging
from fedvlm.algorithms.base import Algorithm, Averaged, Local, Program, Sent, State, Train
from fedvlm.layers import matcher, select
from fedvlm.settings.method import Factors
from fedvlm.tree import Tree, factor, split, step

IAT = {"part:language": "A", "": "B"}


class ShareConfig(Averaging):
    """Settings of ``share``, a share map from the configuration."""

    share: dict[str, Factors] = Field(
        description="pattern of module names -> aggregated factors (A, B, AB, none); a pattern may "
        "be part:vision, part:projector, part:language, layer:0-3, joined by &"
    )

    @field_validator("share")
    @classmethod
    def _patterns_can_be_read(cls, share: dict[str, Factors]) -> dict[str, Factors]:
        for pattern in share:
            matcher(pattern)
        return share


def sharing(share: Mapping[str, str], *, train: str = "AB", server_lr: float = 1.0) -> Algorithm:
    """The algorithm that aggregates the factors of a map; clients keep the other trained factors.

    Args:
        share: pattern of module names (see :func:`fedvlm.layers.matcher`) -> ``"A"``, ``"B"``,
            ``"AB"`` or ``"none"``. The first pattern that matches a module decides. A module
            without a match shares nothing.
        train: the trained factors: ``"A"``, ``"B"`` or ``"AB"``.
        server_lr: step of the server towards the clients' mean; 1 reaches it.
    """
    shared = select(share)

    @cache
    def trained(name: str) -> bool:
        return factor(name) in train

    @cache
    def uploads(name: str) -> bool:
        return trained(name) and shared(name)

    def work(local: Local) -> Program:
        end, _ = yield Train(local.begin, trained)
        up, rest = split(end, uploads)
        return Sent(up, split(rest, trained)[0])

    def update(state: State, mean: Tree, round: int) -> Tree:
        return step({n: state[n] for n in mean}, mean, server_lr)

    return Algorithm(
        init=lambda initial: split(initial, uploads)[0],
        send=lambda state, visit: state,
        model=lambda initial, down, mine: {**initial, **down, **mine},
        work=work,
        server=Averaged(update),
    )


def alternating(*, server_lr: float = 1.0) -> Algorithm:
    """RoLoRA: a round trains and sends one factor, B first; every client downloads both."""

    def work(local: Local) -> Program:
        def turn(name: str) -> bool:
            return factor(name) == ("B" if local.visit.round % 2 else "A")

        end, _ = yield Train(local.begin, turn)
        return Sent(split(end, turn)[0])

    return replace(sharing({"": "AB"}, server_lr=server_lr), work=work)

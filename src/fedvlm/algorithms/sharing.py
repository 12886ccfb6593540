"""Algorithms that differ only in which factors are shared: one map from modules to factors.

- FedVLM's personalized LoRA (pLoRA), arXiv 2507.17088: share B, keep A.
- FedIT / FedAvg of LoRA, arXiv 2305.05644: share A and B.
- FedSA-LoRA, arXiv 2410.01463: share A, keep B.
- FFA-LoRA, arXiv 2403.12313: A frozen at its common start, share B.
- Local training: share nothing.
- FedAvg with local tuning at the end, the baseline of arXiv 2108.07313 (FedAvg + FT).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from fedvlm.algorithms.base import Algorithm, Phase
from fedvlm.tree import Select, factor, module, split, step


def sharing(share: Mapping[str, str], *, train: str = "AB", server_lr: float = 1.0) -> Algorithm:
    """The algorithm that aggregates the factors a map names, and keeps the other trained ones.

    Args:
        share: regular expression over module names -> ``"A"``, ``"B"``, ``"AB"`` or ``"none"``.
            The first pattern found in a module's name decides; a module that none matches shares
            nothing.
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

    return Algorithm(
        init=lambda adapter: split(adapter, uploads)[0],
        download=lambda state, client: state,
        start=lambda adapter, down, mine: {**adapter, **down, **mine},
        phases=(Phase(trained),),
        finish=lambda down, end: (split(end, uploads)[0], split(end, keeps)[0]),
        update=lambda state, mean: step(state, mean, server_lr),
    )


def tuned(algorithm: Algorithm, steps: int) -> Algorithm:
    """``algorithm``, then ``steps`` of local tuning of all factors; the results stay local."""
    everything = Phase(lambda name: True, steps=steps)
    last = replace(
        algorithm,
        phases=(everything,),
        finish=lambda down, end: ({}, dict(end)),
        update=lambda state, mean: state,
    )
    return replace(algorithm, final=last)


def select(share: Mapping[str, str]) -> Select:
    """The names that a share map takes."""
    rules = [(re.compile(pattern), factors) for pattern, factors in share.items()]

    @cache
    def shared(name: str) -> bool:
        for pattern, factors in rules:
            if pattern.search(module(name)):
                return factor(name) in factors if factors != "none" else False
        return False

    return shared

"""Two adapters a client, in one of the model's rank: the first half of the ranks and the second.

The adapters' sum is trained and used, each with weight 1. Payloads are half of LoRA's.

- ``pair``: a shared and an own half, trained together; the shared one is averaged.
- FedDPA-T, Yang et al., arXiv 2403.19211: a round trains the shared half with the own one switched
  off, and the own half beside the shared one as it was downloaded. The paper weighs the two by an
  instance's likeness to the client's data (its code by 0.5 each while training); that is not here.
- FedALT, Bian et al., arXiv 2503.11880: the own half is trained beside a frozen one, the mean of
  the other clients' own halves (the last that each has sent), A and B apart. The paper's mixer, a
  gate that weighs the two by the input, is not here. The server keeps every client's last half.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fedvlm.algorithms.base import Algorithm, Client, Phase, State, Upload
from fedvlm.algorithms.similarity import average, remembered, seen
from fedvlm.tree import Tree, cut, factor, mask, pad, plain, step


def pair(ranks: int, *, server_lr: float = 1.0) -> Algorithm:
    """A shared half and an own half, trained together."""
    half = ranks // 2
    return Algorithm(
        init=lambda adapter: cut(adapter, 0, half),
        download=lambda state, client: state,
        start=lambda adapter, down, mine: _sum(half, down, mine or cut(adapter, half, ranks)),
        phases=(Phase(_all),),
        finish=lambda work: (cut(work.end, 0, half), cut(work.end, half, ranks)),
        update=lambda state, mean: step(state, mean, server_lr),
    )


def feddpa(ranks: int, *, server_lr: float = 1.0) -> Algorithm:
    """FedDPA-T: the shared half alone, then the own half beside it."""
    both, half = pair(ranks, server_lr=server_lr), ranks // 2

    def without_own(down: Tree, mine: Tree, now: Tree) -> Tree:
        off = {n: t * mask(n, t, 0, half) for n, t in now.items() if factor(n) == "B"}
        return {**now, **off}

    def with_own(down: Tree, mine: Tree, now: Tree) -> Tree:
        return _sum(half, down, mine or cut(now, half, ranks))

    return Algorithm(
        init=both.init,
        download=both.download,
        start=both.start,
        phases=(
            Phase(_all, begin=without_own, mask=partial(mask, first=0, last=half)),
            Phase(_all, begin=with_own, mask=partial(mask, first=half, last=ranks)),
        ),
        finish=lambda work: (cut(work.ends[0], 0, half), cut(work.end, half, ranks)),
        update=both.update,
    )


def fedalt(ranks: int) -> Algorithm:
    """An own half, beside the frozen mean of the others' own halves."""
    half = ranks // 2

    def download(state: State, client: Client) -> Tree:
        others = [other for other in seen(state) if other != client.name]
        return average(state, others) if others else plain(state)

    def gather(state: State, uploads: Sequence[Upload]) -> State:
        return remembered(state, uploads)

    return Algorithm(
        init=lambda adapter: cut(adapter, 0, half),
        download=download,
        start=lambda adapter, down, mine: _sum(half, down, mine or cut(adapter, half, ranks)),
        phases=(Phase(_all, mask=partial(mask, first=half, last=ranks)),),
        finish=lambda work: (cut(work.end, half, ranks),) * 2,
        update=lambda state, mean: state,
        gather=gather,
    )


def _all(name: str) -> bool:
    return True


def _sum(half: int, first: Tree, second: Tree) -> Tree:
    """The adapter of both halves."""
    right = pad(second, half, 0)
    return {n: t + right[n] for n, t in pad(first, 0, half).items()}

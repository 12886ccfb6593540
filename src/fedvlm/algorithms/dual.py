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

from fedvlm.algorithms.base import (
    Algorithm,
    Averaged,
    Gathered,
    Local,
    Program,
    Send,
    Sent,
    State,
    Train,
    Upload,
    Visit,
    Work,
)
from fedvlm.algorithms.similarity import average, remembered, seen
from fedvlm.tree import Tree, cut, factor, mask, pad, plain, step


def pair(ranks: int, *, server_lr: float = 1.0) -> Algorithm:
    """A shared half and an own half, trained together."""
    half = ranks // 2

    def work(local: Local) -> Program:
        end, _ = yield Train(local.begin)
        return Sent(cut(end, 0, half), cut(end, half, ranks))

    return _halves(half, work, Averaged(lambda state, mean, round: step(state, mean, server_lr)))


def feddpa(ranks: int, *, server_lr: float = 1.0) -> Algorithm:
    """FedDPA-T: the shared half alone, then the own half beside it."""
    half = ranks // 2

    def work(local: Local) -> Program:
        off = {
            n: t * mask(n, t, 0, half) if factor(n) == "B" else t for n, t in local.begin.items()
        }
        shared, _ = yield Train(off, mask=partial(mask, first=0, last=half))
        own = local.mine or cut(shared, half, ranks)
        both = _sum(half, local.down, own)
        end, _ = yield Train(both, mask=partial(mask, first=half, last=ranks))
        return Sent(cut(shared, 0, half), cut(end, half, ranks))

    return _halves(half, work, Averaged(lambda state, mean, round: step(state, mean, server_lr)))


def fedalt(ranks: int) -> Algorithm:
    """An own half, beside the frozen mean of the others' own halves."""
    half = ranks // 2

    def send(state: State, visit: Visit) -> Tree:
        others = [other for other in seen(state) if other != visit.client]
        return average(state, others) if others else plain(state)

    def work(local: Local) -> Program:
        end, _ = yield Train(local.begin, mask=partial(mask, first=half, last=ranks))
        own = cut(end, half, ranks)
        return Sent(own, own)

    def gather(state: State, uploads: Sequence[Upload], round: int) -> Tree:
        return remembered(state, uploads)

    return _halves(half, work, Gathered(gather), send)


def _as_it_is(state: State, visit: Visit) -> Tree:
    return state


def _halves(
    half: int, work: Work, server: Averaged | Gathered, send: Send = _as_it_is
) -> Algorithm:
    return Algorithm(
        init=lambda initial: cut(initial, 0, half),
        send=send,
        model=lambda initial, down, mine: _sum(half, down, mine or cut(initial, half, 2 * half)),
        work=work,
        server=server,
    )


def _sum(half: int, first: Tree, second: Tree) -> Tree:
    """The adapter of both halves."""
    right = pad(second, half, 0)
    return {n: t + right[n] for n, t in pad(first, 0, half).items()}

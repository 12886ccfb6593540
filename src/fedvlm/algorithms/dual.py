"""Two adapters a client, stored as one: the first half and the second half of the ranks.

The sum of both adapters is trained and used, each with weight 1. Messages have half the size of
LoRA's. Weights that depend on the input are not implemented for any of them: such a sum is no
longer one LoRA, so it could not be merged, nor loaded by PEFT, and engines would need layers of
their own.

- ``pair``: a shared and a personal half, trained together. The server averages the shared half.
- FedDPA-T, Yang et al., arXiv 2403.19211: a round first trains the shared half with the personal
  half switched off, then the personal half beside the downloaded shared half. Not here: the paper
  weighs the halves by the similarity of an instance to the client's data (its code by 0.5 each in
  training).
- FedALT, Bian et al., arXiv 2503.11880: the personal half is trained beside a frozen half. The
  frozen half is the mean of the other clients' personal halves, as last sent by each, with separate
  means of A and of B. The server keeps the last half of every client. Not here: the paper's mixer,
  a gate that weighs the two halves by the input.
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
    """A shared half and a personal half, trained together."""
    half = ranks // 2

    def work(local: Local) -> Program:
        end, _ = yield Train(local.begin)
        return Sent(cut(end, 0, half), cut(end, half, ranks))

    return _halves(half, work, Averaged(lambda state, mean, round: step(state, mean, server_lr)))


def feddpa(ranks: int, *, server_lr: float = 1.0) -> Algorithm:
    """FedDPA-T: trains the shared half alone, then the personal half beside the download."""
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
    """A personal half, beside the frozen mean of the other clients' personal halves."""
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
    """The adapter with both halves of the ranks."""
    right = pad(second, half, 0)
    return {n: t + right[n] for n, t in pad(first, 0, half).items()}

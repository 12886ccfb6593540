"""Clients of unequal ranks, and two algorithms for them.

A client of a lower rank has zeros in the ranks that it lacks. They stay zero: where A is zero, B
gets no gradient, and the reverse. The client receives and sends its own ranks only. All clients
have the same scaling, ``lora.alpha`` over the largest rank, so a factor means the same at each
client. (FLoRA's code also has one scaling for all: its alpha is twice the client's rank.)

- FlexLoRA, Bai et al., arXiv 2402.11505: the server averages the products B A. Every client gets
  the singular vectors of the largest singular values, as many as its rank. The even split of the
  singular values between A and B is ours.
- HetLoRA, Cho et al., arXiv 2401.06432: lower ranks are padded with zeros, and the mean is weighted
  by the norms of the clients' products. Clients get the first ranks of the mean. The rank
  self-pruning of the paper is not implemented.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fedvlm.algorithms.base import (
    Algorithm,
    Ask,
    Averaged,
    Gathered,
    Local,
    Program,
    Sent,
    State,
    Train,
    Upload,
    Visit,
    changed,
)
from fedvlm.algorithms.server import ServerConfig
from fedvlm.algorithms.sharing import sharing
from fedvlm.errors import FedVLMError
from fedvlm.layers import searcher
from fedvlm.settings.method import AlgorithmConfig
from fedvlm.tree import Tree, cut, factorized, number, pad, pairs, products, rank, split

RANK = "rank"


class ProductConfig(AlgorithmConfig):
    """Settings of ``flexlora`` and ``hetlora``."""

    server: ServerConfig = ServerConfig()


def flexlora() -> Algorithm:
    """The nearest factors to the mean product."""

    def lift(upload: Tree, visit: Visit) -> tuple[Tree, float]:
        return products(upload), visit.weight

    def update(state: State, mean: Tree, round: int) -> Tree:
        return factorized(mean, state, rank(state))

    return replace(sharing({"": "AB"}), server=Averaged(update, lift))


def hetlora() -> Algorithm:
    """The mean of the factors, weighted by the norm of the whole adapter's product."""

    def lift(upload: Tree, visit: Visit) -> tuple[Tree, float]:
        # |B A|^2 is the trace of (B' B)(A A').
        squares = [
            ((upload[b].T @ upload[b]) * (upload[a] @ upload[a].T)).sum()
            for a, b in pairs(upload).values()
        ]
        square = sum(squares[1:], squares[0])
        # A dry run has shapes without values.
        weight = 1.0 if square.is_meta else float(square.clamp(min=1e-20).sqrt())
        return upload, weight

    return replace(sharing({"": "AB"}), server=Averaged(lambda state, mean, round: mean, lift))


def ranked(algorithm: Algorithm, ranks: Mapping[str, int] | None, largest: int) -> Algorithm:
    """``algorithm`` for clients of unequal ranks.

    Args:
        algorithm: an algorithm whose trees have factors of the largest rank.
        ranks: pattern of client names -> rank. The first pattern that matches decides. A client
            without a match has the largest rank. None: all clients have the largest rank, and the
            algorithm is unchanged.
        largest: ``lora.rank``.
    """
    if not ranks:
        return algorithm
    patterns = [(searcher(pattern), r) for pattern, r in ranks.items()]

    def full(tree: Tree) -> Tree:
        own, told = _factors(tree)
        told.pop(RANK, None)
        return {**pad(own, 0, largest - rank(own)), **told} if own else told

    def rank_of(down: Tree) -> int:
        r, (own, _) = int(down[RANK]), _factors(down)
        if not 1 <= r <= largest or (own and rank(own) != r):
            raise FedVLMError(f"the download states rank {r}, and its factors have another rank")
        return r

    def send(state: State, visit: Visit) -> Tree:
        r = next((r for fits, r in patterns if fits(visit.client)), largest)
        return {**_only(algorithm.send(state, visit), r), RANK: number(r)}

    def model(initial: Tree, down: Tree, mine: Tree) -> Tree:
        whole = algorithm.model(initial, full(down), full(mine))
        return full(_only(whole, rank_of(down)))

    def work(local: Local) -> Program:
        r = rank_of(local.down)

        def narrow(ask: Ask) -> Ask:
            if isinstance(ask, Train):
                return replace(ask, begin=full(_only(ask.begin, r)))
            return replace(ask, trees=[full(_only(tree, r)) for tree in ask.trees])

        whole = replace(local, down=full(local.down), mine=full(local.mine))
        sent = yield from changed(algorithm.work(whole), narrow)
        return Sent(_only(sent.up, r), _only(sent.keep, r))

    return replace(algorithm, send=send, model=model, work=work, server=_filled(algorithm, full))


def _filled(algorithm: Algorithm, full: Callable[[Tree], Tree]) -> Averaged | Gathered:
    """The server of ``algorithm``, with uploads of lower ranks padded before it sees them."""
    server = algorithm.server
    if isinstance(server, Averaged):
        return replace(server, lift=lambda upload, visit: server.lift(full(upload), visit))

    def gather(state: State, uploads: Sequence[Upload], round: int) -> Tree:
        return server.update(state, [replace(u, tree=full(u.tree)) for u in uploads], round)

    return Gathered(gather)


def _factors(tree: Tree) -> tuple[Tree, Tree]:
    """The factors, and the scalars beside them."""
    return split(tree, lambda n: tree[n].ndim > 0)


def _only(tree: Tree, r: int) -> Tree:
    """The tree with the first ``r`` ranks only."""
    own, told = _factors(tree)
    return {**cut(own, 0, r), **told}

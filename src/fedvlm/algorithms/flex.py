"""Clients of unequal ranks, and the two algorithms that were made for them.

A client of a lower rank has zeros in the ranks that it lacks. They stay zero: an A of zeros gives B
no gradient there, nor B A. It is sent its own ranks only, and sends no others. All clients have the
same scaling, ``lora.alpha`` over the largest rank (FLoRA's code does so, with twice each client's
rank as its alpha), so a factor means the same to each of them.

- FlexLoRA, Bai et al., arXiv 2402.11505: the server averages the products B A, and every client
  gets the singular vectors of the largest singular values that its rank has room for. That the
  values are split evenly between A and B is ours.
- HetLoRA, Cho et al., arXiv 2401.06432: lower ranks are padded with zeros, the mean is weighted
  by the norms of the clients' products, and clients get the first ranks of it. The rank
  self-pruning of that paper is not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fedvlm.algorithms.base import (
    Algorithm,
    Client,
    Phase,
    State,
    Term,
    Upload,
    Work,
    everywhere,
)
from fedvlm.algorithms.sharing import sharing
from fedvlm.tree import Tree, cut, factorized, pad, pairs, products, rank, split

RANK = "rank"
NORM = "norm"


def flexlora() -> Algorithm:
    """The nearest factors to the mean product."""

    def update(state: State, mean: Tree) -> State:
        return factorized(mean, state, rank(state))

    lift = lambda upload, client: products(upload)  # noqa: E731
    return replace(sharing({"": "AB"}), lift=lift, update=update)


def hetlora() -> Algorithm:
    """The mean of the factors, weighted by the norm of the whole adapter's product."""

    def lift(upload: Tree, client: Client) -> Tree:
        # |B A|^2 is the trace of (B' B)(A A'). The mean's own weight is taken out again.
        squares = [
            ((upload[b].T @ upload[b]) * (upload[a] @ upload[a].T)).sum()
            for a, b in pairs(upload).values()
        ]
        weight = sum(squares[1:], squares[0]).clamp(min=1e-20).sqrt() / client.weight
        return {**{n: weight * t for n, t in upload.items()}, NORM: weight}

    def update(state: State, mean: Tree) -> State:
        return {n: t / mean[NORM] for n, t in mean.items() if n != NORM}

    return replace(sharing({"": "AB"}), lift=lift, update=update)


def ranked(algorithm: Algorithm, ranks: Mapping[str, int] | None, largest: int) -> Algorithm:
    """``algorithm`` for clients of unequal ranks.

    Args:
        algorithm: whose trees have factors of the largest rank.
        ranks: pattern over clients' names -> rank; the first that is found decides, and who fits
            none has the largest. None: all have that, and nothing changes.
        largest: ``lora.rank``.
    """
    if not ranks:
        return algorithm
    patterns = [(re.compile(pattern), r) for pattern, r in ranks.items()]

    def rank_of(client: Client) -> int:
        return next((r for p, r in patterns if p.search(client.name)), largest)

    def full(tree: Tree) -> Tree:
        own, told = split(tree, lambda n: tree[n].ndim > 0)
        told.pop(RANK, None)
        return {**pad(own, 0, largest - rank(own)), **told} if own else told

    def own_ranks(down: Tree, tree: Tree) -> Tree:
        return only(tree, int(down[RANK]))

    def only(tree: Tree, r: int) -> Tree:
        own, told = split(tree, lambda n: tree[n].ndim > 0)  # numbers that are no factors
        return {**cut(own, 0, r), **told}

    def begun(begin: Callable[[Tree, Tree, Tree], Tree]) -> Callable[[Tree, Tree, Tree], Tree]:
        return lambda down, mine, now: full(own_ranks(down, begin(full(down), full(mine), now)))

    def term(given: Term) -> Term:
        return replace(given, constant=lambda down, mine: given.constant(full(down), full(mine)))

    def phase(given: Phase) -> Phase:
        begin = begun(given.begin) if given.begin else None
        return replace(given, begin=begin, terms=tuple(map(term, given.terms)))

    def change(one: Algorithm) -> Algorithm:
        def download(state: State, client: Client) -> Tree:
            import torch

            r = rank_of(client)
            return {**only(one.download(state, client), r), RANK: torch.tensor(r)}

        def start(adapter: Tree, down: Tree, mine: Tree) -> Tree:
            return full(own_ranks(down, one.start(adapter, full(down), full(mine))))

        def options(adapter: Tree, down: Tree, mine: Tree) -> list[Tree]:
            assert one.options is not None
            found = one.options(adapter, full(down), full(mine))
            return [full(own_ranks(down, tree)) for tree in found]

        def whole(work: Work) -> Work:
            return replace(work, down=full(work.down), mine=full(work.mine))

        def finish(work: Work) -> tuple[Tree, Tree]:
            upload, mine = one.finish(whole(work))
            return own_ranks(work.down, upload), own_ranks(work.down, mine)

        def tried(work: Work) -> list[Tree]:
            assert one.tried is not None
            return [full(own_ranks(work.down, tree)) for tree in one.tried(whole(work))]

        def gather(state: State, uploads: Sequence[Upload]) -> State:
            assert one.gather is not None
            return one.gather(state, [replace(u, tree=full(u.tree)) for u in uploads])

        return replace(
            one,
            download=download,
            start=start,
            phases=tuple(map(phase, one.phases)),
            finish=finish,
            lift=lambda upload, client: one.lift(full(upload), client),
            gather=gather if one.gather else None,
            options=options if one.options else None,
            tried=tried if one.tried else None,
        )

    return everywhere(change, algorithm)

"""Terms that keep clients together while they train.

- FedProx, Li et al., arXiv 1812.06127: ``mu / 2 * |w - download|^2`` is added to the loss.
- SCAFFOLD, Karimireddy et al., arXiv 1910.06378, algorithm 1 with option II for the control
  variates. It corrects steps of plain SGD, the only optimizer it is defined for. Where clients
  are sampled or differ in size, means are weighted by examples, as everywhere here; the paper's are
  not weighted. With gradient clipping, the corrected gradient is what is clipped.
"""

from __future__ import annotations

from dataclasses import replace

from fedvlm.algorithms.base import Algorithm, Client, Phase, State, Term, Work, everywhere
from fedvlm.algorithms.sharing import sharing
from fedvlm.tree import Tree, factor, named, part, plain

CONTROL = "control"
CHANGE = "changes"


def towards_download(mu: float) -> Term:
    """The gradient of ``mu / 2 * |w - download|^2``, on the factors that were sent."""
    return Term(lambda down, mine: {n: -mu * t for n, t in plain(down).items()}, rate=mu)


def proximal(algorithm: Algorithm, mu: float | None) -> Algorithm:
    """``algorithm``, with a proximal term in all rounds but the one of local tuning at the end."""
    if not mu:
        return algorithm
    term = towards_download(mu)

    def change(one: Algorithm) -> Algorithm:
        return replace(one, phases=tuple(replace(p, terms=(*p.terms, term)) for p in one.phases))

    return replace(everywhere(change, algorithm), final=algorithm.final)


def scaffold(*, server_lr: float = 1.0) -> Algorithm:
    """FedAvg of A and B with control variates: a client keeps its own, the server their mean."""
    plain_one = sharing({"": "AB"}, server_lr=server_lr)

    def init(adapter: Tree) -> State:
        return {**adapter, **named(CONTROL, {n: t.new_zeros(t.shape) for n, t in adapter.items()})}

    def correction(down: Tree, mine: Tree) -> Tree:
        own = part(mine, CONTROL)
        return {n: c - own[n] if own else c for n, c in part(down, CONTROL).items()}

    def finish(work: Work) -> tuple[Tree, Tree]:
        own, upload, kept = part(work.mine, CONTROL), dict(work.end), {}
        (path,) = work.paths
        for name, c in part(work.down, CONTROL).items():
            old = own[name] if own else c.new_zeros(c.shape)
            kept[name] = old - c + (work.down[name] - work.end[name]) / path[factor(name)]
            upload[f"{CHANGE}/{name}"] = kept[name] - old
        return upload, named(CONTROL, kept)

    def lift(upload: Tree, client: Client) -> Tree:
        moved = part(upload, CHANGE).items()
        return {**plain(upload), **named(CONTROL, {n: client.sampled * t for n, t in moved})}

    def update(state: State, mean: Tree) -> State:
        new = plain_one.update(plain(state), plain(mean))
        moved = part(mean, CONTROL)
        controls = {n: c + moved[n] for n, c in part(state, CONTROL).items()}
        return {**new, **named(CONTROL, controls)}

    return Algorithm(
        init=init,
        download=lambda state, client: state,
        start=lambda adapter, down, mine: {**adapter, **plain(down)},
        phases=(Phase(lambda name: True, terms=(Term(correction),)),),
        finish=finish,
        update=update,
        lift=lift,
    )

"""Extra terms in client training, against the drift of clients.

- FedProx, Li et al., arXiv 1812.06127: ``mu / 2 * |w - download|^2`` is added to the loss.
- SCAFFOLD, Karimireddy et al., arXiv 1910.06378, algorithm 1 with option II for the control
  variates. It corrects steps of plain SGD, the only optimizer for which the paper defines it. Means
  are weighted by examples, as everywhere in this package; the means of the paper are not. With
  gradient clipping, the corrected gradient is clipped.
"""

from __future__ import annotations

from dataclasses import replace

from fedvlm.algorithms.base import (
    Algorithm,
    Ask,
    Averaged,
    Local,
    Program,
    Sent,
    State,
    Term,
    Train,
    Visit,
    changed,
)
from fedvlm.tree import Tree, factor, named, part, plain, step

CONTROL = "control"
CHANGE = "changes"


def towards(down: Tree, mu: float) -> Term:
    """The gradient of ``mu / 2 * |w - down|^2``, on the factors in the download."""
    return Term({n: -mu * t for n, t in plain(down).items()}, rate=mu)


def proximal(algorithm: Algorithm, mu: float | None) -> Algorithm:
    """``algorithm`` with a proximal term in all rounds except the final round."""
    if not mu:
        return algorithm

    def work(local: Local) -> Program:
        term = towards(local.down, mu)

        def pulled(ask: Ask) -> Ask:
            return replace(ask, terms=(*ask.terms, term)) if isinstance(ask, Train) else ask

        program = algorithm.work(local)
        return (yield from (program if local.visit.final else changed(program, pulled)))

    return replace(algorithm, work=work)


def scaffold(*, server_lr: float = 1.0) -> Algorithm:
    """FedAvg of A and B with control variates: each client keeps one, the server their mean."""

    def init(initial: Tree) -> State:
        return {**initial, **named(CONTROL, {n: t.new_zeros(t.shape) for n, t in initial.items()})}

    def work(local: Local) -> Program:
        server, own, kept = part(local.down, CONTROL), part(local.mine, CONTROL), {}
        correction = {n: c - own[n] if own else c for n, c in server.items()}
        end, path = yield Train(local.begin, terms=(Term(correction),))
        up = dict(end)
        for name, c in server.items():
            old = own[name] if own else c.new_zeros(c.shape)
            kept[name] = old - c + (local.down[name] - end[name]) / path[factor(name)]
            up[f"{CHANGE}/{name}"] = kept[name] - old
        return Sent(up, named(CONTROL, kept))

    def lift(upload: Tree, visit: Visit) -> tuple[Tree, float]:
        moved = {n: visit.sampled * t for n, t in part(upload, CHANGE).items()}
        return {**plain(upload), **named(CONTROL, moved)}, visit.weight

    def update(state: State, mean: Tree, round: int) -> Tree:
        moved = part(mean, CONTROL)
        controls = {n: c + moved[n] for n, c in part(state, CONTROL).items()}
        return {**step(plain(state), plain(mean), server_lr), **named(CONTROL, controls)}

    return Algorithm(
        init=init,
        send=lambda state, visit: state,
        model=lambda initial, down, mine: {**initial, **plain(down)},
        work=work,
        server=Averaged(update, lift),
    )

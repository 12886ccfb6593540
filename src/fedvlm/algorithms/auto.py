"""``auto``: A is shared, and all clients vote with which B they begin their rounds.

The candidates are the server's B (then a round is one of lora, for clients that are alike), the
client's own B (fedsa, arXiv 2410.01463, for clients that differ), and the mean of both. Every third
round each client sends its doubt of each candidate: the mean probability that the right tokens of
its validation rows do not get. All begin the next rounds with the candidate of the least mean.

The loss has no bound, and prefers a model that is unsure everywhere. One client has too few
validation rows to choose alone. A vote costs three forward passes over them, and four numbers.
"""

from __future__ import annotations

from dataclasses import replace

from fedvlm.algorithms.base import Algorithm, Averaged, Local, Program, Score, Sent, Train
from fedvlm.algorithms.mixing import blend
from fedvlm.algorithms.sharing import sharing
from fedvlm.tree import Tree, factor, named, number, part, plain

DOUBTS, CHOICE = "doubts", "auto/choice"
FIRST, EVERY = 2, 3  # the first round with a vote, and rounds from one vote to the next
OWN = (0.0, 0.5, 1.0)  # the candidates: the share of the client's own B


def auto(*, server_lr: float = 1.0) -> Algorithm:
    """FedAvg of A and B, whose clients begin with the B that they have voted for.

    Args:
        server_lr: step of the server towards the clients' mean; 1 reaches it.
    """
    both = sharing({"": "AB"}, server_lr=server_lr)
    server = both.server
    assert isinstance(server, Averaged)

    def init(initial: Tree) -> Tree:
        return {**initial, CHOICE: number(OWN.index(1.0))}

    def model(initial: Tree, down: Tree, mine: Tree) -> Tree:
        return begun(initial, down, mine, OWN[int(down[CHOICE])])

    def work(local: Local) -> Program:
        vote: Tree = {}
        if local.visit.round >= FIRST and (local.visit.round - FIRST) % EVERY == 0:
            trees = [begun(local.begin, local.down, local.mine, share) for share in OWN]
            found = [s.doubt for s in (yield Score(trees))] if local.mine else []
            told = enumerate([*(found or [0.0] * len(OWN)), float(bool(found))])
            like = next(iter(local.begin.values()))
            vote = named(DOUBTS, {str(k): like.new_tensor(value) for k, value in told})
        end, _ = yield Train(local.begin)
        return Sent({**end, **vote}, {n: t for n, t in end.items() if factor(n) == "B"})

    def update(state: Tree, mean: Tree, round: int) -> Tree:
        changes = server.update(plain(state), plain(mean), round)
        # A secure sum is rounded at random, by less than this rounding, and must not decide a tie.
        doubts = part(mean, DOUBTS).items()
        votes = {int(k): float(t.double().round(decimals=6)) for k, t in doubts}
        if votes.get(len(OWN), 0.0) > 0:  # the last number counts the voters
            changes[CHOICE] = number(min(range(len(OWN)), key=votes.__getitem__))
        return changes

    return replace(both, init=init, model=model, work=work, server=replace(server, update=update))


def begun(whole: Tree, down: Tree, mine: Tree, share: float) -> Tree:
    """The download, with a share of the client's own B; ``whole`` has the other tensors."""
    return {**whole, **blend({"A": 1.0, "B": 1.0 - share}, plain(down), mine)}

"""``auto``: A is shared, and all clients choose together with which B they begin their rounds.

The candidates are the server's B, the client's own B, and the mean of both. With the server's B, a
round is one of FedAvg (lora), which suits clients that are alike. With the own B, it is one of
FedSA-LoRA (fedsa, arXiv 2410.01463), which suits clients that differ. Every :data:`EVERY` rounds,
each client computes the doubt of each candidate: the mean probability that the right tokens of its
validation rows do not get. The server averages the doubts over the clients, and sends the means.
All clients begin their next rounds with the candidate of the least mean doubt.

The doubt is bounded. The loss is not, and prefers a model that is unsure everywhere to a model that
is right more often and sure of some errors. A client's own doubts decide worse than the mean of all
clients, because a client has few validation rows.

A client sends what it sends in lora, and four numbers in the rounds with a vote. A vote costs three
forward passes over the validation rows. Before the first vote, clients begin with their own B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedvlm.algorithms.base import Algorithm, Averaged, Local, Program, Score, Sent, State, Train
from fedvlm.algorithms.sharing import sharing
from fedvlm.tree import Tree, factor, named, part, plain

DOUBTS, CHOICE = "doubts", "auto/choice"
FIRST, EVERY = 2, 3  # the first round with a vote, and rounds from one vote to the next
OWN = (0.0, 0.5, 1.0)
"""The candidates: the share of the client's own B."""


def auto(*, server_lr: float = 1.0) -> Algorithm:
    """FedAvg of both factors, where the clients' validation rows choose the B to begin with.

    Args:
        server_lr: step of the server towards the clients' mean; 1 reaches it.
    """
    import torch

    both = sharing({"": "AB"}, server_lr=server_lr)
    assert isinstance(both.server, Averaged)
    average = both.server.update

    def init(initial: Tree) -> State:
        return {**initial, CHOICE: torch.tensor(len(OWN) - 1)}

    def model(initial: Tree, down: Tree, mine: Tree) -> Tree:
        return begun(initial, down, mine, OWN[int(down[CHOICE])])

    def work(local: Local) -> Program:
        vote: Tree = {}
        if local.visit.round >= FIRST and (local.visit.round - FIRST) % EVERY == 0:
            trees = [begun(local.begin, local.down, local.mine, share) for share in OWN]
            scores = (yield Score(trees)) if local.mine else ()
            vote = ballot([found.doubt for found in scores])
        end, _ = yield Train(local.begin)
        own = {name: tensor for name, tensor in end.items() if factor(name) == "B"}
        return Sent({**end, **vote}, own)

    def update(state: State, mean: Tree, round: int) -> Tree:
        changes = average(plain(state), plain(mean), round)
        doubts = part(mean, DOUBTS)
        if doubts and doubts["voters"] > 0:
            least = min(range(len(OWN)), key=lambda k: float(doubts[str(k)]))
            changes[CHOICE] = torch.tensor(least)
        return changes

    return replace(
        both, init=init, model=model, work=work, server=replace(both.server, update=update)
    )


def begun(whole: Tree, down: Tree, mine: Tree, share: float) -> Tree:
    """The download, with a share of the client's own B; ``whole`` has the other tensors."""
    own = {name: down[name].lerp(tensor, share) for name, tensor in mine.items()}
    return {**whole, **plain(down), **own}


def ballot(doubts: Sequence[float]) -> Tree:
    """A client's vote: its doubt of each candidate; no doubts: an abstention."""
    import torch

    told = {str(k): torch.tensor(d) for k, d in enumerate(doubts or [0.0] * len(OWN))}
    return named(DOUBTS, {**told, "voters": torch.tensor(float(bool(doubts)))})

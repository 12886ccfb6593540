"""FedRot-LoRA: clients turn their factors towards the download before the server averages them.

Zhang et al., arXiv 2602.23638. For any orthogonal R, the factors ``B R`` and ``R' A`` have the
product B A. Factors of two clients may be turned against each other, and then cancel in the mean. A
client sends the turn of its factors that lies nearest to the download: by B in odd rounds, where R
minimizes ``|B R - B_down|``, and by A in even rounds, where R minimizes ``|R' A - A_down|``. Both
are orthogonal Procrustes problems, solved by an SVD for each module. In round 1 the downloaded B is
zero, and nothing turns.

This is the full alignment of the authors' code, which alternates in the same way. The paper's soft
variant, between no turn and the full one, is not implemented. Along directions in which the two
factors have no overlap, R is the identity (a millionth of the identity is added to the overlap).
"""

from __future__ import annotations

from dataclasses import replace

from fedvlm.algorithms.base import Algorithm, Local, Program, Sent, Train
from fedvlm.algorithms.sharing import sharing
from fedvlm.tree import Tree, pairs


def rotating(*, server_lr: float = 1.0) -> Algorithm:
    """FedAvg of both factors, after each client has turned its own towards the download."""

    def work(local: Local) -> Program:
        end, _ = yield Train(local.begin)
        return Sent(turned(end, local.begin, by="B" if local.visit.round % 2 else "A"))

    return replace(sharing({"": "AB"}, server_lr=server_lr), work=work)


def turned(tree: Tree, towards: Tree, by: str) -> Tree:
    """The adapter with the same products whose A or whose B is nearest to that of another one.

    Args:
        tree: the adapter to turn.
        towards: an adapter with the same names and shapes.
        by: the factor that is brought near, ``"A"`` or ``"B"``.
    """
    import torch

    found: Tree = {}
    for a, b in pairs(tree).values():
        rows = tree[a].mT if by == "A" else tree[b]
        goal = towards[a].mT if by == "A" else towards[b]
        overlap = rows.double().mT @ goal.double()  # [rank, rank]
        small = 1e-6 * overlap.norm() + 1e-30
        same = torch.eye(len(overlap), dtype=overlap.dtype, device=overlap.device)
        u, _, v = torch.linalg.svd(overlap + small * same)
        turn = u @ v
        found[a] = (turn.mT @ tree[a].double()).to(tree[a].dtype)
        found[b] = (tree[b].double() @ turn).to(tree[b].dtype)
    return {n: found[n] for n in tree}

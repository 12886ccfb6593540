"""LoRA-FAIR: the server corrects the mean of B, so that its product with the mean of A is right.

Bian et al., arXiv 2411.14961. The product of the mean factors, B A, is not the mean of the clients'
products, W. The server adds to B the residual D that minimizes ``|W - (B + D) A|^2 + ridge |D|^2``.
Clients begin the next round with A and B + D (the paper's Avg-Initial).

The paper compares W and (B + D) A by their cosine similarity and finds D by SGD. The squared
distance here is ours: its minimum is unique and has a closed form, ``D = R A' (A A' + ridge)^-1``
with ``R = W - B A``. Known from the abstract and a summary; the authors' code was not available.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedvlm.algorithms.averaging import Averaging
from fedvlm.algorithms.base import Algorithm, Averaged, State, Visit
from fedvlm.algorithms.sharing import sharing
from fedvlm.tree import Tree, module, named, pairs, part, plain, products, step

if TYPE_CHECKING:
    from torch import Tensor

PRODUCT = "product"


class ResidualConfig(Averaging):
    """Settings of ``lorafair``."""

    ridge: Annotated[float, Field(gt=0)] = Field(
        0.01, description="weight of the correction's squared norm; larger: a smaller correction"
    )


def corrected(ridge: float, *, server_lr: float = 1.0) -> Algorithm:
    """The mean of A, and the mean of B with the correction.

    Args:
        ridge: weight of the squared norm of the correction, above 0.
        server_lr: step of the server towards the two factors; 1 reaches them.
    """

    def lift(upload: Tree, visit: Visit) -> tuple[Tree, float]:
        return {**upload, **named(PRODUCT, products(upload))}, visit.weight

    def update(state: State, mean: Tree, round: int) -> Tree:
        new, wanted = plain(mean), part(mean, PRODUCT)
        for a, b in pairs(new).values():
            new[b] = new[b] + _residual(wanted[module(a)], new[a], new[b], ridge)
        return step({n: state[n] for n in new}, new, server_lr)

    return replace(sharing({"": "AB"}), server=Averaged(update, lift))


def _residual(wanted: Tensor, a: Tensor, b: Tensor, ridge: float) -> Tensor:
    """The correction of B, ``[out, rank]``, for a wanted product ``[out, in]``."""
    import torch

    wide, rest = a.double(), wanted.double() - b.double() @ a.double()
    gram = wide @ wide.T + ridge * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    return torch.linalg.solve(gram, wide @ rest.T).T.to(b.dtype)

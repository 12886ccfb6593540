"""RELA, the aggregation of FedMosaic: each client gets its own mean of the other clients.

Seo et al., arXiv 2506.11024 (the paper of Co-LoRA). A client trains its own adapter beside a frozen
one. The frozen one is the mean of the other clients' adapters, weighted by the softmax of the
cosines of their directions to the client's. Directions decay: each round counts half of all before
it and half of the new one. Decay and softmax temperature are those of the authors' code, and so are
weights without numbers of examples. A client that has sent nothing gets the mean by examples.

As in ``fedalt``, the two adapters are the halves of the ranks, added with weight 1 each. Of the
paper, these are not here: the learned gate between them, because a run trains A and B only;
Co-LoRA, for clients with different models; and gradients of a small frozen model with noise as
directions. The direction here is the change of a client's upload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedvlm.algorithms.base import Algorithm, Gathered, State, Upload, Visit
from fedvlm.algorithms.dual import fedalt
from fedvlm.algorithms.similarity import average, last_upload, remembered, seen
from fedvlm.settings.method import AlgorithmConfig
from fedvlm.tree import Mean, Tree, cut, named, part, plain

if TYPE_CHECKING:
    from torch import Tensor

BEGIN = "begin"
TREND = "trend"


class RelevanceConfig(AlgorithmConfig):
    """Settings of ``fedmosaic``."""

    temperature: Annotated[float, Field(gt=0)] = Field(
        0.5, description="softmax temperature over cosines; smaller: shares with fewer clients"
    )


def relevance(ranks: int, temperature: float) -> Algorithm:
    """A personal half, beside the frozen mean of the other clients' halves by relevance."""
    half, base = ranks // 2, fedalt(ranks)

    def init(initial: Tree) -> State:
        return {**base.init(initial), **named(BEGIN, cut(initial, half, ranks))}

    def send(state: State, visit: Visit) -> Tree:
        import torch

        names, known = sorted(plain(state)), seen(state)
        others = [other for other in known if other != visit.client]
        if not others or visit.client not in known:
            return average(state, others) if others else plain(state)
        own = _direction(state, visit.client, names)
        cosines = torch.stack([own @ _direction(state, other, names) for other in others])
        mean = Mean()
        for other, weight in zip(others, torch.softmax(cosines / temperature, 0), strict=True):
            mean.add(last_upload(state, other, names), max(float(weight), 1e-30))
        return mean.tree()

    def gather(state: State, uploads: Sequence[Upload], round: int) -> Tree:
        new, known, first = remembered(state, uploads), seen(state), part(state, BEGIN)
        for upload in uploads:
            client = upload.visit.client
            again = client in known
            begin = last_upload(state, client, first) if again else first
            for n, end in upload.tree.items():
                key, change = f"{TREND}/{n}/{client}", end - begin[n]
                new[key] = (state[key] + change) / 2 if again else change
        return new

    return replace(base, init=init, send=send, server=Gathered(gather))


def _direction(state: State, client: str, names: Sequence[str]) -> Tensor:
    """The decayed change of a client's uploads, as a flat vector of length 1."""
    import torch

    flat = torch.cat([state[f"{TREND}/{n}/{client}"].flatten() for n in names])
    return torch.nn.functional.normalize(flat, dim=0)

"""FedLEASE: groups of clients by their B, as many groups as fit best.

Wang et al., arXiv 2509.15087. The distance of two clients is the mean over modules of one minus the
cosine of their B. Agglomerative clustering with average linkage gives the groups, and the largest
mean silhouette gives their number, from 2 up to a limit. Each group has one adapter (an expert),
the mean of its clients' uploads.

A client here uses the expert of its own group only. The paper's router, which mixes up to M experts
by the input, is not implemented: a mixture by input is no single LoRA. The paper groups once, after
a warm-up of local training. Here the warm-up is round 1, and the server groups the last uploads of
all clients anew after every round, so that clients that come later find a group. Clients of a group
begin a round alike, so groups tend to stay. Fewer than three clients are one group, because the
silhouette needs three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedvlm.algorithms.base import Algorithm, Gathered, State, Upload, Visit
from fedvlm.algorithms.dendrogram import cuts, silhouette
from fedvlm.algorithms.sharing import sharing
from fedvlm.algorithms.similarity import GROUP, average, last_upload, remembered, seen
from fedvlm.settings.method import LARGEST, AlgorithmConfig
from fedvlm.tree import Tree, factor, named, plain

if TYPE_CHECKING:
    from torch import Tensor


class ExpertsConfig(AlgorithmConfig):
    """Settings of ``fedlease``."""

    experts: Annotated[int, Field(ge=2, le=LARGEST)] = Field(
        4, description="largest number of groups of clients; the silhouette chooses from 2 up to it"
    )


def experts(most: int) -> Algorithm:
    """One adapter for each group of clients.

    Args:
        most: the largest number of groups, 2 or more.
    """

    def send(state: State, visit: Visit) -> Tree:
        known, group = seen(state), state.get(f"{GROUP}/{visit.client}")
        if group is not None:
            known = [c for c in known if state[f"{GROUP}/{c}"] == group]
        return average(state, known) if known else plain(state)

    def gather(state: State, uploads: Sequence[Upload], round: int) -> Tree:
        new = remembered(state, uploads)
        labels = grouped(apart(new), most)
        return {**new, **named(GROUP, dict(zip(seen(new), labels.unbind(), strict=True)))}

    return replace(sharing({"": "AB"}), send=send, server=Gathered(gather))


def apart(state: State) -> Tensor:
    """The distances of the clients' last uploads, ``[clients, clients]``."""
    import torch

    names, found = sorted(n for n in plain(state) if factor(n) == "B"), []
    trees = [last_upload(state, client, names) for client in seen(state)]
    for name in names:
        flat = torch.stack([tree[name].flatten().double() for tree in trees])
        unit = torch.nn.functional.normalize(flat, dim=1)
        found.append((1 - unit @ unit.T).fill_diagonal_(0.0))
    return torch.stack(found).mean(0).cpu()


def grouped(distances: Tensor, most: int) -> Tensor:
    """The group of each client, ``[clients]``: the partition of the largest mean silhouette."""
    options = cuts(distances)
    fit = options[1 : min(most, len(options) - 1)]  # two groups or more, fewer than clients
    return max(fit, key=lambda labels: silhouette(distances, labels), default=options[0])

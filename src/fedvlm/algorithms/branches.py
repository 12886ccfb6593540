"""FedTreeLoRA: one tree of clients; deeper layers are shared by fewer of them.

Bian et al., arXiv 2603.13282. The distance of two clients in a layer is that of their B (Frobenius
norm). Agglomerative clustering of the mean distances over all layers gives one tree of clients.
Each layer cuts the tree: from the first layer to the last, the number of groups never falls, and
rises by less than ``window`` a layer. It is the number with the largest mean silhouette of the
layer's distances. One group counts as ``threshold``. A client gets, layer by layer, the mean of its
group.

This is the paper's variant with the cluster expert only. The external expert, the mean of all other
clients with a learned scalar weight, is not implemented: a run trains A and B only. The paper
builds the tree once, after a warm-up of local training. Here the warm-up is round 1, and the server
builds it from the last uploads of all clients after every round. For a vision-language model the
layers are in the order of a forward pass, the image side first. The linkage (average) and the
defaults of ``threshold`` and ``window`` are ours. Known from the abstract and a summary.
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
from fedvlm.layers import layer, part
from fedvlm.settings.method import AlgorithmConfig, Positive
from fedvlm.tree import Tree, factor, module, named, plain

if TYPE_CHECKING:
    from torch import Tensor

FORWARD = ("vision", "projector", "language")


class BranchesConfig(AlgorithmConfig):
    """Settings of ``fedtree``."""

    threshold: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.1, description="a layer is split if a silhouette is above this; larger: shares with more"
    )
    window: Positive = Field(3, description="the groups grow by less than this from layer to layer")


def branches(threshold: float, window: int) -> Algorithm:
    """A mean for each group of clients in each layer; the groups of later layers are smaller."""

    def send(state: State, visit: Visit) -> Tree:
        known, own = seen(state), state.get(f"{GROUP}/{visit.client}")
        if own is None:
            return average(state, known) if known else plain(state)
        down: Tree = {}
        for depth, names in enumerate(layers(state)):
            group = [c for c in known if state[f"{GROUP}/{c}"][depth] == own[depth]]
            down |= average(state, group, only=names)
        return down

    def gather(state: State, uploads: Sequence[Upload], round: int) -> Tree:
        new = remembered(state, uploads)
        found = grouped(apart(new), threshold, window)
        return {**new, **named(GROUP, dict(zip(seen(new), found, strict=True)))}

    return replace(sharing({"": "AB"}), send=send, server=Gathered(gather))


def layers(state: State) -> list[list[str]]:
    """The names of the factors of each layer, in the order of a forward pass."""
    found: dict[tuple[int, int], list[str]] = {}
    for name in sorted(plain(state)):
        place = FORWARD.index(part(module(name))), layer(module(name))
        found.setdefault(place, []).append(name)
    return [found[place] for place in sorted(found)]


def apart(state: State) -> Tensor:
    """The distances of the clients' last uploads in each layer, ``[layers, clients, clients]``."""
    import torch

    known, found = seen(state), []
    for names in layers(state):
        trees = [last_upload(state, client, names) for client in known]
        flat = [
            torch.stack([tree[n].flatten().double() for tree in trees])
            for n in names
            if factor(n) == "B"
        ]
        exact = "donot_use_mm_for_euclid_dist"
        gaps = [torch.cdist(one, one, compute_mode=exact) for one in flat]
        found.append(torch.stack(gaps).mean(0))
    return torch.stack(found).cpu()


def grouped(distances: Tensor, threshold: float, window: int) -> list[Tensor]:
    """The group of each client in each layer: for each client, ``[layers]``.

    Args:
        distances: ``[layers, clients, clients]``.
        threshold: the score of a single group.
        window: the number of groups rises by less than this from layer to layer.
    """
    import torch

    options, count, chosen = cuts(distances.mean(0)), 1, []
    for own in distances:
        numbers = range(count, min(len(options), count + window))
        scores = {c: silhouette(own, options[c - 1]) if c > 1 else threshold for c in numbers}
        count = max(scores, key=lambda c: scores[c], default=count)
        chosen.append(options[count - 1])
    return list(torch.stack(chosen, 1).unbind())

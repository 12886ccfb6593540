"""Aggregation by the similarity of the clients' uploads.

The server keeps the last upload of every client that has sent one, so its memory and its
checkpoints grow with the number of clients. The similarity of two clients is the cosine of their
changes to the common initial adapter.

- ``similar``: each client gets its own mean of all uploads, weighted by examples and by
  ``exp(cosine / temperature)``. The idea is that of FedAMP (Huang et al., arXiv 2007.03797). The
  softmax is ours, and FedAMP's proximal term is not implemented.
- ``clustered``: spherical k-means groups the uploads, and a client gets the mean of its group.
  Clustered federated learning (Sattler et al., arXiv 1910.01991) also groups by the cosines of
  updates, but splits groups in two when its criterion is met. Here the number of groups is given,
  as in IFCA (Ghosh et al., arXiv 2006.04088), where clients choose a group by their loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedvlm.algorithms.base import Algorithm, Gathered, State, Upload, Visit
from fedvlm.algorithms.sharing import sharing
from fedvlm.settings.method import AlgorithmConfig, Positive
from fedvlm.tree import Mean, Tree, named, part, plain

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT = "weight"
UPLOAD = "upload"
GROUP = "group"


class SimilarConfig(AlgorithmConfig):
    """Settings of ``similar``."""

    temperature: Annotated[float, Field(gt=0)] = Field(
        0.1, description="softmax temperature over cosines; smaller: shares with fewer clients"
    )


class ClusteredConfig(AlgorithmConfig):
    """Settings of ``clustered``."""

    clusters: Positive = Field(2, description="number of groups of clients")


def similar(temperature: float) -> Algorithm:
    """A mean for each client, with larger weights for similar clients."""

    def send(state: State, visit: Visit) -> Tree:
        import torch

        if f"{WEIGHT}/{visit.client}" not in state:
            return part(state, "mean") or plain(state)
        changes = _changes(state)
        own = changes[visit.client]
        likeness = torch.stack([own @ other for other in changes.values()])
        parts = torch.softmax(likeness / temperature, 0).tolist()
        return average(state, changes, dict(zip(changes, parts, strict=True)))

    def gather(state: State, uploads: Sequence[Upload], round: int) -> Tree:
        new = remembered(state, uploads)
        return {**new, **named("mean", average(new, seen(new)))}

    return replace(sharing({"": "AB"}), send=send, server=Gathered(gather))


def clustered(groups: int, iterations: int = 20) -> Algorithm:
    """One shared model for each group of clients."""

    def send(state: State, visit: Visit) -> Tree:
        group = state.get(f"{GROUP}/{visit.client}")
        if group is None:
            return part(state, "mean") or plain(state)
        return average(state, [c for c in seen(state) if state[f"{GROUP}/{c}"] == group])

    def gather(state: State, uploads: Sequence[Upload], round: int) -> Tree:
        new = remembered(state, uploads)
        found = grouped(_changes(new), groups, iterations)
        return {**new, **named("mean", average(new, seen(new))), **named(GROUP, found)}

    return replace(sharing({"": "AB"}), send=send, server=Gathered(gather))


def grouped(changes: Mapping[str, Tensor], groups: int, iterations: int) -> Tree:
    """Client -> the number of its group, by k-means on unit vectors.

    The first centre is the first client. Each further centre is the client that is least similar to
    the centres so far. So the same uploads always give the same groups.
    """
    import torch

    vectors = torch.stack(list(changes.values()))
    centres = vectors[:1]
    while len(centres) < min(groups, len(vectors)):
        nearest = (vectors @ centres.T).max(1).values
        centres = torch.cat([centres, vectors[nearest.argmin()][None]])
    for _ in range(iterations):
        chosen = (vectors @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, chosen, vectors)
        filled = sums.norm(dim=1, keepdim=True) > 0
        centres = torch.where(filled, torch.nn.functional.normalize(sums, dim=1), centres)
    chosen = (vectors @ centres.T).argmax(1)
    return dict(zip(changes, chosen.unbind(), strict=True))


def remembered(state: State, uploads: Sequence[Upload]) -> State:
    """The state with the uploads of a round in place of the former uploads of these clients."""
    import torch

    new = dict(state)
    for visit, tree in ((u.visit, u.tree) for u in uploads):
        new[f"{WEIGHT}/{visit.client}"] = torch.tensor(visit.weight)
        new |= {f"{UPLOAD}/{n}/{visit.client}": t for n, t in tree.items()}
    return new


def seen(state: State) -> list[str]:
    """The clients with an upload in the state."""
    return sorted(part(state, WEIGHT))


def average(
    state: State,
    clients: Iterable[str],
    parts: Mapping[str, float] | None = None,
    only: Collection[str] = (),
) -> Tree:
    """The mean of the last uploads of some clients, weighted by examples and by ``parts``.

    Args:
        state: the state of the server.
        clients: the clients of the mean.
        parts: client -> factor of its weight; None: 1.
        only: the names of the factors of the mean; empty: all.
    """
    mean, names = Mean(), only or plain(state)
    for client in clients:
        weight = float(state[f"{WEIGHT}/{client}"]) * (parts[client] if parts else 1.0)
        mean.add(last_upload(state, client, names), max(weight, 1e-30))
    return mean.tree()


def last_upload(state: State, client: str, names: Iterable[str]) -> Tree:
    """The factors of some names in the last upload of a client that has sent one."""
    return {n: state[f"{UPLOAD}/{n}/{client}"] for n in names}


def _changes(state: State) -> dict[str, Tensor]:
    """Client -> its change to the common initial adapter, as a flat vector of length 1."""
    import torch

    initial = dict(sorted(plain(state).items()))  # a fixed order, so that sums round the same way
    found = {}
    for client in seen(state):
        sent = last_upload(state, client, initial)
        flat = torch.cat([(sent[n] - t).flatten() for n, t in initial.items()])
        found[client] = torch.nn.functional.normalize(flat, dim=0)
    return found

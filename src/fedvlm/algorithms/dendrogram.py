"""Hierarchical clustering of items with known distances, and a score for the number of clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cuts(distances: Tensor) -> list[Tensor]:
    """All partitions of agglomerative clustering with average linkage.

    Args:
        distances: ``[items, items]``, symmetric, with a zero diagonal.

    Returns:
        The cluster of each item, ``[items]``: entry ``c - 1`` has ``c`` clusters. Each entry splits
        one cluster of the entry before it. A cluster has the number of its first item.
    """
    import torch

    count = len(distances)
    gaps = distances.double().clone().fill_diagonal_(torch.inf)
    sizes, labels = torch.ones(count, dtype=gaps.dtype), torch.arange(count)
    found = [labels]
    for _ in range(count - 1):
        i, j = sorted(divmod(int(gaps.argmin()), count))
        gaps[i] = (sizes[i] * gaps[i] + sizes[j] * gaps[j]) / (sizes[i] + sizes[j])
        gaps[:, i] = gaps[i]
        gaps[j] = gaps[:, j] = torch.inf
        sizes[i] += sizes[j]
        labels = torch.where(labels == j, i, labels)
        found.append(labels)
    return found[::-1]


def silhouette(distances: Tensor, labels: Tensor) -> float:
    """The mean silhouette of a partition, in [-1, 1] (Rousseeuw, 1987).

    Args:
        distances: ``[items, items]``, with a zero diagonal.
        labels: the cluster of each item, with two clusters or more.
    """
    import torch

    inside = (labels[:, None] == labels.unique()).to(distances.dtype)  # [items, clusters]
    sizes, sums = inside.sum(0), distances @ inside
    own = (sums * inside).sum(1) / (inside @ sizes - 1).clamp(min=1)
    other = (sums / sizes).masked_fill(inside.bool(), torch.inf).min(1).values
    width = (other - own) / torch.maximum(other, own).clamp(min=1e-30)
    return float(width.masked_fill(inside @ sizes == 1, 0.0).mean())

"""Aggregation that one client cannot decide: shrunken changes, or a trimmed mean.

- ``norm``: a change larger than ``bound`` times the median norm of the round's changes is shrunk to
  that norm, cf. norm clipping in Sun et al., arXiv 1911.07963 (there with a fixed bound). All other
  changes pass untouched, so a round without a large change is bit for bit that of the plain mean.
- ``trimmed``: the coordinate-wise trimmed mean of Yin et al., arXiv 1803.01498, here weighted by
  examples.

Both are functions of the uploads in the order of the cohort. Nothing is remembered between rounds,
so a resumed run has the same results.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedvlm.algorithms.base import Algorithm, Gathered, Upload
from fedvlm.algorithms.table import find
from fedvlm.errors import ConfigError
from fedvlm.settings.sections import Config
from fedvlm.tree import Tree, change, wide

if TYPE_CHECKING:
    from torch import Tensor

HELD = 16
"""Uploads that wait for the first median. In a larger cohort, a later upload meets the median of
all norms so far, so the server's memory does not grow with the cohort."""

FEWEST = 3
"""Clients of a round without which no client is far from the others."""

MOST = 64
"""Uploads of a round that a trimmed mean may hold."""


class NormBound:
    """Shrinks changes that are far larger than the round's median; folds are delayed until then.

    Args:
        bound: the largest norm of a change, in medians of the norms.
        downs: client -> its download.

    Attributes:
        bounded: client -> ``norm`` of its change, and ``bound``, to which the change was shrunk.
    """

    def __init__(self, bound: float, downs: Mapping[str, Tree]):
        self.bound, self.downs = bound, downs
        self.bounded: dict[str, dict[str, float]] = {}
        self._norms: list[float] = []  # sorted
        self._held: list[tuple[Upload, float]] = []
        self._begun = False

    def add(self, upload: Upload, size: float) -> list[Upload]:
        """Takes an upload; returns the uploads that can be folded now, in order.

        Args:
            upload: the upload of a client.
            size: the norm of its change of the download.
        """
        insort(self._norms, size)
        if self._begun:
            return [self._shrunk(upload, size)]
        self._held.append((upload, size))
        return self.rest() if len(self._held) == HELD else []

    def rest(self) -> list[Upload]:
        """The uploads that still wait, in order."""
        held, self._held, self._begun = self._held, [], True
        return [self._shrunk(upload, size) for upload, size in held]

    def _shrunk(self, upload: Upload, size: float) -> Upload:
        count, client = len(self._norms), upload.visit.client
        limit = self.bound * self._norms[(count - 1) // 2]
        if count < FEWEST or size <= limit:
            return upload
        self.bounded[client] = {"norm": size, "bound": limit}
        tree = shrunk(self.downs[client], upload.tree, limit / size)
        return Upload(upload.visit, tree)


def shrunk(down: Tree, up: Tree, share: float) -> Tree:
    """An upload with a share of its change of the download.

    Tensors that the download lacks in this shape are changes themselves. Whole numbers stay.
    """
    found = dict(up)
    for name, moved in change(down, up).items():
        if up[name].is_floating_point():
            known = name in down and down[name].shape == moved.shape
            found[name] = down[name] + share * moved if known else share * moved
    return found


class Trimmed:
    """A weighted mean without the largest and the smallest values of each element.

    Args:
        share: the share of the trees left out at each end, rounded up to whole trees. At least one
            tree stays, or two of an even number.
    """

    def __init__(self, share: float):
        self.share, self.total = share, 0.0
        self._trees: list[Tree] = []
        self._weights: list[float] = []

    def add(self, tree: Mapping[str, Tensor], weight: float) -> None:
        """Holds one upload.

        Raises:
            ValueError: the names differ from earlier uploads, or the weight is not positive.
        """
        if weight <= 0:
            raise ValueError(f"a weight must be positive, got {weight}")
        if self._trees and tree.keys() != self._trees[0].keys():
            odd = sorted(tree.keys() ^ self._trees[0].keys())[:3]
            raise ValueError(f"uploads differ in their tensors, for example {odd}")
        self._trees.append(dict(tree))
        self._weights.append(weight)
        self.total += weight

    def tree(self) -> Tree:
        """The trimmed mean of the held trees; empty before the first one."""
        count = len(self._trees)
        cut = min(math.ceil(self.share * count - 1e-9), (count - 1) // 2)
        names = self._trees[0] if self._trees else ()
        return {n: self._element([t[n] for t in self._trees], cut) for n in names}

    def _element(self, tensors: Sequence[Tensor], cut: int) -> Tensor:
        import torch

        values, order = torch.stack([wide(t) for t in tensors]).sort(0)  # [clients, ...]
        weights = torch.tensor(self._weights, dtype=values.dtype, device=values.device)[order]
        inner = slice(cut, len(tensors) - cut)
        return (values[inner] * weights[inner]).sum(0) / weights[inner].sum(0)


def check(config: Config, algorithm: Algorithm, clients: int | None = None) -> None:
    """Refuses a trimmed mean that cannot be made.

    Args:
        config: the settings of the run.
        algorithm: its algorithm.
        clients: the number of its clients; None: not known yet.

    Raises:
        ConfigError: the algorithm has no mean, or a round has too few or too many clients.
    """
    if config.aggregate.kind != "trimmed" or find(config.algorithm.name).pools:
        return
    name, instead = config.algorithm.name, "set aggregate.kind=norm"
    if isinstance(algorithm.server, Gathered):
        raise ConfigError(
            [
                f"aggregate.kind=trimmed trims a mean, but the server of algorithm.name={name} has "
                f"no mean: {instead}, or choose another algorithm"
            ]
        )
    if clients is None:
        return
    size = min(config.train.clients_per_round or clients, clients)
    if size < FEWEST:
        raise ConfigError(
            [
                f"aggregate.kind=trimmed needs at least {FEWEST} clients in a round, but there are "
                f"{size}: {instead}"
            ]
        )
    if size > MOST:
        raise ConfigError(
            [
                f"aggregate.kind=trimmed holds every upload of a round, so it takes at most {MOST} "
                f"clients, but there are {size}: {instead}, or train.clients_per_round={MOST}"
            ]
        )

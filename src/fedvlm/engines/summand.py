"""What a client adds to a secure sum, and the mean that the server reads from the sum.

The lift of an algorithm, such as the product B A, is computed by the client, because the server
sees no single upload. A client adds the change of the download; the server adds the download to the
mean.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import numpy as np

from fedvlm.algorithms.base import Algorithm, Averaged, Visit
from fedvlm.algorithms.dry import bare
from fedvlm.engines.wire import norm, sent_up
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.tree import Tree, change, plain, wide

logger = logging.getLogger("fedvlm")

STEEPEST = 64.0
"""Largest loss in a sum; a larger one counts as this one."""


@dataclass(frozen=True)
class Summed:
    """The outcome of a secure sum.

    Attributes:
        clients: the clients in the sum.
        tree: the weighted mean of their lifted uploads; empty where nothing was sent, or void.
        loss: the weighted mean of their training losses; None where they tell none.
        bytes_up: client -> bytes of all its messages.
        void: the reason why there is no sum; empty for a sum.
    """

    clients: tuple[str, ...] = ()
    tree: Tree = field(default_factory=dict)
    loss: float | None = 0.0
    bytes_up: dict[str, int] = field(default_factory=dict)
    void: str = ""


class Summand:
    """The form of the values in a sum, alike at all clients and at the server.

    Args:
        algorithm: the algorithm of the run, whose server averages.
        adapter: the common initial adapter; only its shapes are used, so they may be on `meta`.
        visit: any client of the round.
        down: the download, the same for all clients.
        max_norm: see :class:`fedvlm.engines.wire.Forms`.

    Attributes:
        size: the number of values.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        adapter: Tree,
        visit: Visit,
        down: Tree,
        max_norm: float | None = None,
    ):
        import torch

        assert isinstance(algorithm.server, Averaged), "checked before round 1"
        self._lift, self._down, self._max_norm = algorithm.server.lift, down, max_norm
        form = sent_up(algorithm, bare(adapter), visit, bare(down))
        device = next(iter(adapter.values())).device
        blank = {n: torch.zeros(t.shape, dtype=t.dtype, device=device) for n, t in form.items()}
        lifted = self._lifted(blank, visit) if blank else {}
        self._form = {name: wide(lifted[name]) for name in sorted(lifted)}
        self.size = sum(t.numel() for t in self._form.values()) + 1

    def _lifted(self, blank: Tree, visit: Visit) -> Tree:
        """What the server takes of an upload without values.

        Raises:
            ConfigError: the algorithm weighs an upload by what is in it. In a sum, such a weight
                has no limit, and it is not 1 where a site hides its rows.
        """
        lifted, weight = self._lift(blank, replace(visit, weight=2.0))
        if weight != 2.0:
            raise ConfigError(
                [
                    "with wire.secure each site weighs its upload by its number of rows, but the "
                    "algorithm weighs it by its values (hetlora does): choose another "
                    "algorithm.name, or set wire.secure=false"
                ]
            )
        return lifted

    def values(self, upload: Tree, visit: Visit, unit: float, loss: float) -> tuple:
        """The values of a client, float64, and its weight.

        Args:
            upload: the upload of the client.
            visit: the client, with its own number of training examples.
            unit: the number of examples whose weight is 1; a client with more has this weight too.
            loss: its training loss.

        Raises:
            FedVLMError: the change is larger than ``max_norm``.
        """
        moved = norm(change(self._down, upload))
        if self._max_norm is not None and not moved <= self._max_norm:
            # The error travels to the server, which must not learn a number of one upload.
            logger.warning("the upload differs from the download by a norm of %.4g", moved)
            raise FedVLMError(
                "the upload differs from the download by a norm above "
                f"wire.max_norm={self._max_norm:g}; the site's log has the norm"
            )
        own = replace(visit, weight=min(1.0, visit.weight / unit))
        lifted, weight = self._lift(upload, own) if upload else ({}, own.weight)
        found = change(self._down, lifted)
        flat = [found[n].detach().cpu().double().flatten().numpy() for n in self._form]
        told = np.clip(loss, -STEEPEST, STEEPEST) / STEEPEST
        return np.concatenate([*flat, [told]]), weight

    def mean(self, values: np.ndarray, weight: float) -> tuple[Tree, float]:
        """The mean of the lifted uploads and of the losses.

        Args:
            values: the sum of the clients' weighted values.
            weight: the sum of their weights.

        Raises:
            ValueError: the mean changes more than ``max_norm`` allows each client.
        """
        import torch

        means, tree, first = values / weight, {}, 0
        for name, like in self._form.items():
            part = torch.from_numpy(means[first : first + like.numel()].reshape(like.shape))
            first += like.numel()
            tree[name] = part
        moved = norm(plain({n: t for n, t in tree.items() if self._known(n)}))
        if self._max_norm is not None and moved > self._max_norm * (1 + 1e-6):
            raise ValueError(
                f"the mean differs from the download by a norm of {moved:.4g}, above "
                f"wire.max_norm={self._max_norm:g}"
            )
        for name, like in self._form.items():
            known = self._down[name].cpu().double() if self._known(name) else 0.0
            tree[name] = (tree[name] + known).to(like.dtype)
        return tree, float(means[-1]) * STEEPEST

    def _known(self, name: str) -> bool:
        """Whether the values of a tensor are changes of the download."""
        return name in self._down and self._down[name].shape == self._form[name].shape

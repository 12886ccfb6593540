"""Extra gradients and masks of a stretch of training, for stacks of clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedvlm.algorithms.base import Train
from fedvlm.models.runs import Place


class Extras:
    """The terms and masks of the clients' requests.

    Args:
        asks: the clients' requests, in the order of the stack. All clients have the same rates.
        trained: the places of the trained factors.
    """

    def __init__(self, asks: Sequence[Train], trained: Mapping[str, Place]):
        if not any(ask.terms or ask.mask for ask in asks):
            trained = {}
        self.trained = {name: place.of(place.run.detach()) for name, place in trained.items()}
        self.grads = {name: place.grad for name, place in trained.items()}
        self.constants: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}
        for terms in zip(*(ask.terms for ask in asks), strict=True):
            for name, p in self.trained.items():
                if not any(name in term.constant for term in terms):
                    continue
                none = torch.zeros(p.shape[1:], dtype=p.dtype)
                rows = torch.stack([term.constant.get(name, none) for term in terms])
                self.constants[name] = self.constants.get(name, 0.0) + rows.to(p.device)
                self.rates[name] = self.rates.get(name, 0.0) + terms[0].rate
        self.masks: dict[str, Tensor] = {}
        if any(ask.mask for ask in asks):
            self.masks = {name: _masks(asks, name, p) for name, p in self.trained.items()}
        self._held = {n: self.trained[n].clone() for n in self.masks}

    @torch.no_grad()
    def before(self) -> None:
        """Adds the terms and applies the masks to the gradients; to be called before clipping."""
        for name, constant in self.constants.items():
            self.grads[name].add_(constant).add_(self.trained[name], alpha=self.rates[name])
        for name, mask in self.masks.items():
            self.grads[name].mul_(mask)

    @torch.no_grad()
    def after(self) -> None:
        """Restores the elements outside the masks, which weight decay moves too."""
        for name, mask in self.masks.items():
            p = self.trained[name]
            p.copy_(torch.where(mask, p, self._held[name]))


def _masks(asks: Sequence[Train], name: str, stacked: Tensor) -> Tensor:
    """The clients' masks of one factor, ``[clients, ...]``; all true for a client without mask."""
    found = [
        ask.mask(name, own).expand(own.shape)
        if ask.mask
        else torch.ones_like(own, dtype=torch.bool)
        for ask, own in zip(asks, stacked, strict=True)
    ]
    return torch.stack(found)

"""What a phase may add to plain training: extra gradients, and elements that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedvlm.algorithms.table import Phase
from fedvlm.tree import Tree


class Extras:
    """A phase's terms and mask, for the factors of one client or for stacks of several.

    Args:
        phase: the phase that begins.
        clients: each one's (down, mine), in the order of the stack.
        trained: the parameters, ``[...]`` for one client or ``[clients, ...]``.
    """

    def __init__(
        self,
        phase: Phase,
        clients: Sequence[tuple[Tree, Tree]],
        trained: Mapping[str, nn.Parameter],
    ):
        self.trained = trained
        self.constants: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}
        for term in phase.terms:
            constants = [term.constant(*client) for client in clients]
            for name, p in trained.items():
                if not any(name in tree for tree in constants):
                    continue
                none = torch.zeros(p.shape[-2:])
                rows = torch.stack([tree.get(name, none) for tree in constants])
                found = rows.view(p.shape).to(p.device)
                self.constants[name] = self.constants.get(name, 0.0) + found
                self.rates[name] = self.rates.get(name, 0.0) + term.rate
        self.masks = (
            {n: phase.mask(n, p.detach()) for n, p in trained.items()} if phase.mask else {}
        )
        self._held = {n: trained[n].detach().clone() for n in self.masks}

    @torch.no_grad()
    def before(self) -> None:
        """Changes the gradients, before they are clipped."""
        for name, p in self.trained.items():
            if p.grad is None:
                continue
            if name in self.constants:
                p.grad.add_(self.constants[name]).add_(p, alpha=self.rates[name])
            if name in self.masks:
                p.grad.mul_(self.masks[name])

    @torch.no_grad()
    def after(self) -> None:
        """Puts elements back that are not trained, whatever weight decay made of them."""
        for name, mask in self.masks.items():
            p = self.trained[name]
            p.copy_(torch.where(mask, p, self._held[name]))

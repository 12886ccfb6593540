"""Two attackers on the canaries of a run: one asks a model, one reads its weights.

- ``loss``: the losses of the canaries on the model and on the base model. It needs no weights, and
  works on models that have learnt their rows by heart.
- ``gradient``: where training has moved the adapter little, its change is a sum over the rows of a
  multiple of each row's gradient, plus noise. The attacker takes the canaries' gradients at the
  initial adapter and solves for the multiples (ridge regression). It works on few steps of SGD; so
  it is the attacker to find a noise that is too small.

Both know all canaries and all other rows, and no coin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedvlm.models import lora
from fedvlm.privacy.audit import scores as by_loss
from fedvlm.privacy.canaries import Canary
from fedvlm.tree import Tree, factor

if TYPE_CHECKING:
    from fedvlm.engines.shell import Shell

Models = Iterable[tuple[Sequence[int], Tree]]
"""The models of a view, each with the positions of the canaries that it may reveal."""

FLOATS = 2**28  # of all gradients together: 1 GiB
ORDINARY = 500  # rows without canaries whose gradients are taken, at most, of all clients together
RIDGE = 0.1  # beside squared norms of 1


class Attackers:
    """The attackers of a run.

    Args:
        engine: the engine of the run, with the canaries in its rows.
        found: the canaries.
    """

    def __init__(self, engine: Shell, found: Sequence[Canary]):
        self.engine, self.found = engine, found
        self.params = lora.handles(engine.model)
        everyone = range(len(found))
        self.base = self.losses([(everyone, engine.adapter)])
        self._names = chosen(engine.adapter, FLOATS // max(1, len(found)))
        lora.write(self.params, engine.adapter)
        for name, p in self.params.items():
            p.requires_grad_(name in self._names)
        own = [self._direction(one.rows) for one in found]
        self._atoms = torch.stack(own + self._sums())  # [canaries and clients, floats]

    def scores(self, models: Models) -> dict[str, dict[int, float]]:
        """Attack -> position of a canary -> its score; empty for a view without models."""
        models = list(models)
        if not models:
            return {}
        after = self.losses(models)
        before = [self.base[at] for at in after]
        loss = by_loss(before, list(after.values()))
        return {
            "loss": dict(zip(after, loss.tolist(), strict=True)),
            "gradient": self._multiples(models),
        }

    def losses(self, models: Models) -> dict[int, float]:
        """Position of a canary -> the sum of its rows' losses on its model."""
        engine, size = self.engine, self.engine.config.eval.batch_size
        losses: dict[int, float] = {}
        engine.model.eval()
        for positions, tree in models:
            lora.write(self.params, tree)
            owners = [(at, row) for at in positions for row in self.found[at].rows]
            for start in range(0, len(owners), size):
                part = owners[start : start + size]
                with torch.no_grad():
                    terms = self._terms([row for _, row in part])
                for (at, _), loss in zip(part, terms.loss.tolist(), strict=True):
                    losses[at] = losses.get(at, 0.0) + loss
        return losses

    def _terms(self, rows: Sequence[int]) -> Any:
        return self.engine.objective.terms(self.engine.model, self.engine.collator.training(rows))

    def _direction(self, rows: Sequence[int]) -> Tensor:
        """The gradient of the mean loss of some rows at the initial adapter, with norm 1."""
        terms = self._terms(rows)
        tensors = [self.params[name] for name in self._names]
        loss = (terms.loss / terms.weight).mean()
        found = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
        whole = torch.cat([g.flatten() for g in found]).float().cpu()
        norm = torch.linalg.vector_norm(whole)
        return whole / norm if norm.isfinite() and norm else torch.zeros_like(whole)

    def _sums(self) -> list[Tensor]:
        """For each client, the sum of the directions of its ordinary rows, or of some of them."""
        planted = {row for one in self.found for row in one.rows}
        clients = dict.fromkeys(one.client for one in self.found)
        most, sums = max(1, ORDINARY // len(clients)), []
        for client in clients:
            train = self.engine.partition.splits[client].train.tolist()
            rows = [row for row in train if row not in planted][:most]
            whole = torch.stack([self._direction([row]) for row in rows]).sum(0)
            sums.append(whole / torch.linalg.vector_norm(whole).clamp(min=1e-30))
        return sums

    def _multiples(self, models: Models) -> dict[int, float]:
        """Position of a canary -> the multiple of its gradient in the change of its model.

        The multiples of a client's canaries are scaled to a mean square of 1, because clients with
        other numbers of rows make other steps.
        """
        initial, atoms = self.engine.adapter, self._atoms
        gram = (atoms @ atoms.T).double()
        gram.diagonal().add_(RIDGE)
        found: dict[int, float] = {}
        for positions, tree in models:
            moved = torch.cat([(initial[n] - tree[n]).flatten().float() for n in self._names])
            solved = torch.linalg.solve(gram, (atoms @ moved).double()).tolist()
            found |= {at: solved[at] for at in positions}
        return scaled(found, self.found)


def chosen(adapter: Tree, most: int) -> list[str]:
    """The factors whose gradients are read: B, from the last layer on, up to ``most`` floats.

    At the initial adapter B is zero, and so the gradient of A is zero.
    """
    names: list[str] = []
    room = most
    for name in reversed([n for n in adapter if factor(n) == "B"]):
        room -= adapter[name].numel()
        if room < 0 and names:
            break
        names.append(name)
    return names


def scaled(scores: Mapping[int, float], found: Sequence[Canary]) -> dict[int, float]:
    """The scores, with a mean square of 1 for each client."""
    squares: dict[str, list[float]] = {}
    for at, score in scores.items():
        squares.setdefault(found[at].client, []).append(score**2)
    size = {client: float(np.sqrt(np.mean(own))) or 1.0 for client, own in squares.items()}
    return {at: score / size[found[at].client] for at, score in scores.items()}

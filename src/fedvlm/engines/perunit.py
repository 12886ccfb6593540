"""DP-SGD by the stack: every protected unit of a step is a place of the stack.

The places share one adapter, so that one backward pass gives the gradient of each unit. The
gradients are clipped place by place and summed. Then come the noise and the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedvlm.algorithms.base import Trained
from fedvlm.batches.draw import beside
from fedvlm.engines.extras import Extras
from fedvlm.engines.shell import Shell
from fedvlm.engines.stacked import Session, Streams, clip
from fedvlm.engines.together import Member, Outcome
from fedvlm.models.blocks import Ragged
from fedvlm.models.runs import Runs
from fedvlm.models.stack import Stack
from fedvlm.privacy.chance import noises
from fedvlm.privacy.plan import Plan
from fedvlm.seeds import derive
from fedvlm.tree import Select, Tree

MOST = 64  # units in a pass: more are not faster

Units = Sequence[np.ndarray]
"""The rows of each unit."""


class PerUnit(Shell):
    """The part of the cohort engine that trains a client by DP-SGD.

    Attributes:
        stack: the adapters on the model.
        device: the device of the model.
    """

    stack: Stack
    device: torch.device
    _packed = False  # whether an adapted layer has a first axis other than the rows

    def _session(self, group: Sequence[Member], runs: Runs) -> Session:
        """The optimizer of a stretch."""
        raise NotImplementedError

    def _fitting(self, size: int, most: int | None = None) -> int:
        """The number of clients, with ``size`` rows each, that fit into a pass."""
        raise NotImplementedError

    def _terms(self, rows: np.ndarray) -> Any:
        """The objective on rows; the active places' rows are blocks of equal size."""
        raise NotImplementedError

    def _uniform(self, rows: np.ndarray) -> bool:
        """Whether all pictures of the rows have the same shape."""
        raise NotImplementedError

    def _train_units(self, member: Member) -> tuple[list[Outcome], Session, Sequence[Tensor]]:
        """Trains one client by its plan."""
        ask, plan = member.wanted, self.plans[member.task.client]
        limit, losses = self.config.train.max_grad_norm, list[Tensor]()
        samples, most = self._samples(member), self._most_units
        runs = Runs()
        runs.load([ask.begin], self.stack.places(self.device), ask.trains)
        session, extras = self._session([member], runs), Extras([ask], runs.trained)
        own = {n: place.of(place.run.detach())[0] for n, place in runs.places.items()}
        streams = Streams(lambda _: derive(*self._seed(member), "dropout"))
        self._switch(training=True)
        for units in samples:
            adapter = {n: t.contiguous() for n, t in own.items()}
            total = {n: torch.zeros_like(adapter[n]) for n in runs.trained}
            found = []
            for part in self._passes_of(units, most):
                with streams.of(0):
                    found.append(self._add(part, adapter, plan.clip, total))
            self._set_noisy(runs, total, plan)
            extras.before()
            if limit:
                clip(runs.all_trained, limit)
            session.optimizer.step()
            extras.after()
            each = torch.cat(found) if found else torch.zeros(0)
            losses.append(each.mean() if len(each) else torch.zeros(()))
        (end,) = runs.trees()
        each = torch.stack(losses) if losses else torch.zeros(0)
        return [Outcome(Trained(end, self._path(member)), each)], session, [*runs.all, each]

    @cached_property
    def _most_units(self) -> int:
        """The most units in a pass. With dropout, each unit draws after the unit before it."""
        if self.config.lora.dropout:
            return 1
        settings = self.config
        size = settings.privacy.unit_rows if settings.privacy.column else 1
        usual = settings.train.batch_size * size
        limit = settings.engine.micro_batch or usual + usual // 4  # most samples are one pass
        return min(max(1, limit // size), self._fitting(size, MOST))

    def _passes_of(self, units: Units, most: int) -> Iterator[Units]:
        """The units of each pass; layers that pack rows need pictures of equal shapes."""
        for start in range(0, len(units), most):
            part = units[start : start + most]
            if self._packed and not self._uniform(np.concatenate(part)):
                yield from ([unit] for unit in part)
            else:
                yield part

    def _add(self, units: Units, adapter: Tree, most: float, total: Tree) -> Tensor:
        """Adds the units' gradients, each clipped to the norm ``most``, to ``total``.

        A unit whose loss or gradient is not finite adds nothing.

        Returns:
            The losses of the other units.
        """
        try:
            grads, losses = self._gradients(units, adapter, total.__contains__)
        except Ragged:
            self._packed = True
            return torch.cat([self._add([unit], adapter, most, total) for unit in units])
        each = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads.values()]
        norms = torch.stack([n.to(losses.device) for n in each])
        norms = torch.linalg.vector_norm(norms, dim=0)  # [units]
        finite = norms.isfinite() & losses.isfinite()
        scale = torch.where(finite, (most / norms).clamp(max=1.0), 0.0)
        for name, grad in grads.items():
            kept = grad if finite.all() else grad.nan_to_num(0.0, 0.0, 0.0)
            total[name] += torch.tensordot(scale.to(kept), kept, 1)
        return losses[finite]

    def _gradients(
        self, units: Units, adapter: Tree, trains: Select
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The gradient of each unit's mean loss, ``[units, ...]`` by factor; and these losses.

        Raises:
            Ragged: the units cannot share a pass.
        """
        self.stack.spread(adapter, len(units), trains)
        self.stack.activate(range(len(units)))
        losses = self._losses(units)
        losses.sum().backward()
        found = {n: p.grad for n, p in self.stack.shared.items() if p.grad is not None}
        return found, losses.detach()

    def _losses(self, units: Units) -> Tensor:
        """The mean loss of each unit's rows, each row by its own weight ``[units]``."""
        rows, size = beside(dict(enumerate(units)))
        terms = self._terms(rows)
        counts = torch.tensor([len(unit) for unit in units], device=self.device)
        real = torch.arange(size, device=self.device) < counts[:, None]  # [units, rows]
        each = (terms.loss / terms.weight).view(real.shape)
        return torch.where(real, each, 0.0).sum(1) / counts

    def _set_noisy(self, runs: Runs, total: Tree, plan: Plan) -> None:
        """Sets the gradients: the clipped sum with noise, over the expected number of units."""
        noise = noises(self.chance, total, plan.noise * plan.clip)
        for name, place in runs.trained.items():
            place.grad.copy_(((total[name] + noise[name]) / plan.batch)[None])

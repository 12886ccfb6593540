"""The reference engine: one client after another, in plain PEFT and PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fedvlm.algorithms.base import Train, Trained, Validation, Visit
from fedvlm.batches.draw import pieces
from fedvlm.engines.base import Answer
from fedvlm.engines.shell import Shell
from fedvlm.engines.together import Member, Outcome
from fedvlm.models import lora
from fedvlm.models.generate import greedy
from fedvlm.privacy.chance import noises
from fedvlm.privacy.plan import Plan
from fedvlm.seeds import derive
from fedvlm.tree import Tree, factor


class ReferenceEngine(Shell):
    """Trains and scores clients one at a time on one model in memory.

    Other engines are tested against it. It is written to be read.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.params = lora.handles(self.model)

    def _train(self, group: Sequence[Member]) -> tuple[list[Outcome], Any, Sequence[torch.Tensor]]:
        (member,) = group
        ask, limit = member.wanted, self.config.train.max_grad_norm
        lora.write(self.params, ask.begin)
        self._switch(training=True)
        torch.manual_seed(derive(*self._seed(member), "dropout"))
        trained = {n: p for n, p in self.params.items() if ask.trains(n)}
        for name, p in self.params.items():
            p.requires_grad_(name in trained)
        session = member.session if ask.resume else None
        optimizer = session or self._optimizer(trained, member.task.visit)
        plan = self.plans.get(member.task.client)
        batches: Iterable[Any] = self._samples(member) if plan else self._batches(member)
        losses = []
        for rows in batches:
            optimizer.zero_grad()
            loss = self._private(rows, plan, trained) if plan else self._backward(rows)
            losses.append(loss)
            add_terms(ask, trained)
            if limit:
                torch.nn.utils.clip_grad_norm_(trained.values(), limit)
            optimizer.step()
            put_back(ask, trained)
        end = Trained(lora.read(self.params), self._path(member))
        each = torch.stack(losses) if losses else torch.zeros(0)
        return [Outcome(end, each)], optimizer, [*end.end.values(), each]

    def _optimizer(
        self, trained: dict[str, torch.nn.Parameter], visit: Visit
    ) -> torch.optim.Optimizer:
        """A fresh optimizer, with a learning rate for A and one for B."""
        settings = self.config.train
        scale = settings.rate_scale(visit.round, visit.final)
        groups = [
            {"params": [p for n, p in trained.items() if factor(n) == f], "lr": rate * scale}
            for f, rate in settings.rates.items()
        ]
        groups = [group for group in groups if group["params"]]
        if settings.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=settings.lr, weight_decay=settings.weight_decay)
        fused = self.collator.device.type in ("cpu", "cuda")
        decay = settings.weight_decay
        return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=decay, fused=fused)

    def _backward(self, rows: np.ndarray) -> torch.Tensor:
        """Computes gradients of a batch's mean loss by micro-batches; returns this loss."""
        weight = sum(self.objective.weight(self.collator.features(int(i))) for i in rows)
        losses = []
        for part in pieces(rows, self.config.engine.micro_batch):
            loss = self._terms(part).loss.sum() / weight
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _private(
        self, units: Sequence[np.ndarray], plan: Plan, trained: dict[str, torch.nn.Parameter]
    ) -> torch.Tensor:
        """Computes the noisy mean of the units' clipped gradients; returns their mean loss."""
        total = {name: torch.zeros_like(p) for name, p in trained.items()}
        losses = []
        for rows in units:
            self.model.zero_grad()
            terms = self._terms(rows)
            loss = (terms.loss / terms.weight).mean()
            loss.backward()
            grads = {n: p.grad for n, p in trained.items() if p.grad is not None}
            norm = torch.stack([g.norm() for g in grads.values()]).norm()
            if not (norm.isfinite() and loss.isfinite()):
                continue
            for name, grad in grads.items():
                total[name] += grad * (plan.clip / norm).clamp(max=1.0)
            losses.append(loss.detach())
        noise = noises(self.chance, total, plan.noise * plan.clip)
        for name, p in trained.items():
            p.grad = (total[name] + noise[name]) / plan.batch
        return torch.stack(losses).mean() if losses else torch.zeros(())

    def _terms(self, rows: np.ndarray) -> Any:
        """The objective of the present model: one loss and one weight a row."""
        return self.objective.terms(self.model, self.collator.training(rows))

    def _validate(self, trees: Sequence[Tree], rows: np.ndarray) -> list[Validation]:
        found = []
        for tree in trees:
            lora.write(self.params, tree)
            terms = [self._terms(part) for part in pieces(rows, self.config.eval.batch_size)]
            loss, doubt, weight = (
                float(torch.cat([getattr(t, name) for t in terms]).sum())
                for name in ("loss", "doubt", "weight")
            )
            found.append(Validation(loss / weight, doubt / weight))
        return found

    def _answer(self, models: Sequence[tuple[Tree, np.ndarray]]) -> list[list[Answer]]:
        return [list(self._answers_of(tree, rows)) for tree, rows in models]

    def _answers_of(self, tree: Tree, rows: np.ndarray) -> Iterator[Answer]:
        lora.write(self.params, tree)
        tokens, tokenizer = self.config.eval.max_new_tokens, self.collator.tokenizer
        for part in pieces(rows, self.config.eval.batch_size):
            texts = greedy(self.model, self.collator.prompts(part), tokenizer, tokens)
            yield from self._recorded(part, self._terms(part).rows(), texts)


def add_terms(ask: Train, trained: dict[str, torch.nn.Parameter]) -> None:
    """Adds the terms of a request to the gradients, and clears gradients outside its mask."""
    for name, p in trained.items():
        if p.grad is None:
            continue
        for term in ask.terms:
            if name in term.constant:
                extra = term.constant[name].to(p.device) + term.rate * p.detach()
                p.grad = p.grad + extra
        if ask.mask:
            p.grad = p.grad * ask.mask(name, p.detach())


@torch.no_grad()
def put_back(ask: Train, trained: dict[str, torch.nn.Parameter]) -> None:
    """Restores the elements outside the mask: weight decay moves them without a gradient."""
    for name, p in trained.items() if ask.mask else ():
        assert ask.mask
        p.copy_(torch.where(ask.mask(name, p), p, ask.begin[name].to(p.device)))

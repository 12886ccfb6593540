"""The reference engine: one client after another, plain PEFT and PyTorch. The readable truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedvlm.algorithms import Algorithm, Phase
from fedvlm.data.collate import Collator
from fedvlm.data.partition import Partition
from fedvlm.engines.base import Reply, Scores, Task
from fedvlm.errors import FedVLMError
from fedvlm.metrics import score_texts
from fedvlm.models import lora
from fedvlm.models.generate import greedy
from fedvlm.models.objectives import answer_nll, sft_loss
from fedvlm.sections import Config, TrainConfig
from fedvlm.seeds import derive
from fedvlm.store import Store
from fedvlm.tree import Tree, digest, factor


class ReferenceEngine:
    """Trains and scores clients one at a time on one model in memory."""

    def __init__(
        self, model: Any, collator: Collator, partition: Partition, config: Config, store: Store
    ):
        self.model = model
        self.collator = collator
        self.partition = partition
        self.config = config
        self.store = store
        self.params = lora.handles(model)
        self.adapter = lora.read(self.params)
        self._scores: dict[tuple[str, str], Scores] = {}

    def train(self, algorithm: Algorithm, tasks: Sequence[Task]) -> Iterator[Reply]:
        self._scores.clear()
        for task in tasks:
            tree = self.personal(algorithm, task.client, task.down)
            end, loss = self._train(tree, algorithm.phases, task)
            upload, mine = algorithm.finish(task.down, end)
            self.store.keep(task.client, task.round, mine)
            weight = len(self.partition.splits[task.client].train)
            yield Reply(task.client, upload, weight, loss, end)

    def personal(self, algorithm: Algorithm, client: str, down: Tree) -> Tree:
        return algorithm.start(self.adapter, down, self.store.personal(client))

    def evaluate(self, models: Iterable[tuple[str, Tree]]) -> dict[str, Scores]:
        """Neighbours with equal adapters share batches; within a round nothing is scored twice.

        What is remembered ends with the round: a resumed run scores exactly what an uninterrupted
        one does, in the same batches.
        """
        scores: dict[str, Scores] = {}
        labelled = ((digest(tree), client, tree) for client, tree in models)
        for key, group in itertools.groupby(labelled, key=lambda item: item[0]):
            _, clients, trees = zip(*group, strict=True)
            fresh = [c for c in clients if (c, key) not in self._scores]
            if fresh:
                lora.write(self.params, trees[0])
                found = self._score(fresh)
                self._scores |= {(c, key): s for c, s in found.items()}
            scores |= {c: self._scores[c, key] for c in clients}
        return scores

    def _train(self, tree: Tree, phases: Sequence[Phase], task: Task) -> tuple[Tree, float]:
        settings, rows = self.config.train, self.partition.splits[task.client].train
        lora.write(self.params, tree)
        self.model.train()
        losses: list[torch.Tensor] = []
        for number, phase in enumerate(phases):
            seed = (self.config.seed, task.round, task.client, number)
            torch.manual_seed(derive(*seed, "dropout"))
            trained = {n: p for n, p in self.params.items() if phase.trains(n)}
            for name, p in self.params.items():
                p.requires_grad_(name in trained)
            optimizer = make_optimizer(trained, settings, settings.rate_scale(task.round))
            steps = phase.steps or settings.steps(len(rows))
            for batch in batches(rows, settings.batch_size, steps, derive(*seed, "batches")):
                optimizer.zero_grad()
                step_loss = sft_loss(self.model, self.collator.training(batch))
                step_loss.backward()
                if settings.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm)
                optimizer.step()
                losses.append(step_loss.detach())
        loss, end = torch.stack(losses).mean().item(), lora.read(self.params)
        if not math.isfinite(loss) or not all(t.isfinite().all() for t in end.values()):
            raise FedVLMError(
                f"client '{task.client}' diverged in round {task.round}: its loss is not finite; "
                "lower train.lr, or set train.max_grad_norm"
            )
        return end, loss

    @torch.no_grad()
    def _score(self, clients: Sequence[str]) -> dict[str, Scores]:
        """Scores the model as it is on the held-out rows of some clients."""
        self.model.eval()
        settings = self.config.eval
        held_out = {
            c: getattr(self.partition.splits[c], settings.split)[: settings.max_rows]
            for c in clients
        }
        everyone = np.concatenate(list(held_out.values()))
        nll: list[float] = []
        tokens: list[int] = []
        texts: list[str] = []
        for start in range(0, len(everyone), settings.batch_size):
            batch = everyone[start : start + settings.batch_size]
            losses, counts = answer_nll(self.model, self.collator.training(batch))
            nll += losses.tolist()
            tokens += counts.tolist()
            prompts = self.collator.prompts(batch)
            texts += greedy(self.model, prompts, self.collator.tokenizer, settings.max_new_tokens)
        per_row = score_texts(texts, [self.collator.rows[int(i)]["answer"] for i in everyone])
        scores, end = {}, 0
        for client, rows in held_out.items():
            own = slice(end, end := end + len(rows))
            means = {k: _mean([s[k] for s in per_row[own]]) for k in per_row[0]}
            loss = sum(nll[own]) / sum(tokens[own])
            scores[client] = {"loss": loss, **means, "examples": len(rows)}
        return scores


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def batches(rows: np.ndarray, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """``steps`` batches: the rows shuffled, in pieces of ``size``, shuffled anew when used up."""
    order = np.random.default_rng(seed)
    done = 0
    while True:
        shuffled = order.permutation(rows)
        for start in range(0, len(rows), size):
            if done == steps:
                return
            yield shuffled[start : start + size]
            done += 1


def make_optimizer(
    trained: Mapping[str, torch.nn.Parameter], settings: TrainConfig, scale: float
) -> torch.optim.Optimizer:
    """A fresh optimizer, with its own rate for A and for B."""
    rates = {"A": settings.lr_a or settings.lr, "B": settings.lr_b or settings.lr}
    groups = [
        {"params": [p for n, p in trained.items() if factor(n) == f], "lr": rate * scale}
        for f, rate in rates.items()
    ]
    groups = [g for g in groups if g["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    fused = next(iter(trained.values())).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused
    )

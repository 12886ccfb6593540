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
from fedvlm.engines.base import Answer, Reply, Scores, Task
from fedvlm.errors import FedVLMError
from fedvlm.metrics import average, score_texts
from fedvlm.models import lora, objectives
from fedvlm.models.generate import greedy
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
        self.objective = objectives.build(config.objective)
        self._answers: dict[tuple[str, str], list[Answer]] = {}

    def train(self, algorithm: Algorithm, tasks: Sequence[Task]) -> Iterator[Reply]:
        self._answers.clear()
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
        return {client: average(found) for client, found in self.answers(models).items()}

    def answers(self, models: Iterable[tuple[str, Tree]]) -> dict[str, list[Answer]]:
        """Neighbours with equal adapters share batches; within a round nothing is scored twice.

        What is remembered ends with the round: a resumed run scores exactly what an uninterrupted
        one does, in the same batches.
        """
        answers: dict[str, list[Answer]] = {}
        labelled = ((digest(tree), client, tree) for client, tree in models)
        for key, group in itertools.groupby(labelled, key=lambda item: item[0]):
            _, clients, trees = zip(*group, strict=True)
            fresh = [c for c in clients if (c, key) not in self._answers]
            if fresh:
                lora.write(self.params, trees[0])
                found = self._answer(fresh)
                self._answers |= {(c, key): a for c, a in found.items()}
            answers |= {c: self._answers[c, key] for c in clients}
        return answers

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
                step_loss = self.objective.terms(self.model, self.collator.training(batch)).mean()
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
    def _answer(self, clients: Sequence[str]) -> dict[str, list[Answer]]:
        """The model as it is, on the held-out rows of some clients."""
        settings = self.config.eval
        held_out = {
            c: getattr(self.partition.splits[c], settings.split)[: settings.max_rows]
            for c in clients
        }
        everyone = np.concatenate(list(held_out.values()))
        answers: list[Answer] = []
        for start in range(0, len(everyone), settings.batch_size):
            answers += self.answer_rows(everyone[start : start + settings.batch_size])
        ends = np.cumsum([len(rows) for rows in held_out.values()])
        return {
            c: answers[end - len(held_out[c]) : end] for c, end in zip(held_out, ends, strict=True)
        }

    @torch.no_grad()
    def answer_rows(self, indices: Sequence[int] | np.ndarray) -> list[Answer]:
        """One batch: losses and decoded texts of the model as it is."""
        self.model.eval()
        settings = self.config.eval
        terms = self.objective.terms(self.model, self.collator.training(indices))
        prompts = self.collator.prompts(indices)
        texts = greedy(self.model, prompts, self.collator.tokenizer, settings.max_new_tokens)
        rows = [self.collator.rows[int(i)] for i in indices]
        scores = score_texts(texts, [row["answer"] for row in rows])
        losses = {"loss": terms.loss / terms.weight, **terms.metrics, "weight": terms.weight}
        columns = {name: values.tolist() for name, values in losses.items()}
        return [
            {
                "row": int(row.get("row", index)),
                "group": _text(row.get(settings.group_by)),
                "reference": row["answer"],
                "prediction": texts[n],
                **scores[n],
                **{name: values[n] for name, values in columns.items()},
            }
            for n, (index, row) in enumerate(zip(indices, rows, strict=True))
        ]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


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

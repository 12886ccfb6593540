"""The reference engine: one client after another, plain PEFT and PyTorch. The readable truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedvlm.algorithms.base import Validation
from fedvlm.algorithms.table import Algorithm, Phase, Work
from fedvlm.batches import objectives
from fedvlm.batches.collate import Collator
from fedvlm.data.partition import Partition
from fedvlm.engines.base import Answer, Models, Scores
from fedvlm.engines.extras import Extras
from fedvlm.engines.wire import Forms, Reply, Task
from fedvlm.errors import FedVLMError
from fedvlm.metrics import average, score_texts
from fedvlm.models import lora
from fedvlm.models.generate import greedy
from fedvlm.seeds import derive
from fedvlm.settings.sections import Config, TrainConfig
from fedvlm.store.run import Store
from fedvlm.tree import Tree, digest, factor


class Length(NamedTuple):
    """How batches are sorted, see :func:`batches`."""

    of: Callable[[int], int]
    seed: int


class ReferenceEngine:
    """Trains and scores clients one at a time on one model in memory.

    Attributes:
        width: clients in a pass; the cohort engine has more than one.
        forms: what a download has to be.
        ended: the adapters of ``rated`` tasks when their training ended, until they are scored.
    """

    width = 1

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
        self.forms = Forms(self.adapter)
        self.ended: dict[str, Tree] = {}
        self._answers: dict[tuple[str, str], list[Answer]] = {}

    def train(
        self, algorithm: Algorithm, tasks: Sequence[Task], *, first: int = 0, fresh: bool = True
    ) -> Iterator[Reply]:
        """As in :class:`fedvlm.engines.base.Engine`, also for a part of a round's cohort.

        Args:
            algorithm: of the round.
            tasks: the part.
            first: the position of its first task in the cohort.
            fresh: whether the round begins.
        """
        if fresh:
            self._answers.clear()
            self.ended.clear()
        for start in range(0, len(tasks), self.width):
            group = tasks[start : start + self.width]
            for task in group:
                self.forms.check_download(algorithm, task.client, task.down)
            mines = self.store.personal([task.client for task in group])
            begun = [
                self._begun(algorithm, task.client, task.down, mine)
                for task, mine in zip(group, mines, strict=True)
            ]
            ended = self._train([tree for tree, _ in begun], mines, algorithm.phases, group)
            replies, kept = [], {}
            for task, mine, began, (ends, loss) in zip(group, mines, begun, ended, strict=True):
                self._check_finite(task, ends[-1], loss)
                paths = tuple(self._path(phase, task) for phase in algorithm.phases)
                work = Work(task.down, mine, tuple(ends), paths, *began)
                if algorithm.tried:
                    scores = self._validated(task.client, algorithm.tried(work))
                    work = replace(work, scores=scores)
                upload, kept[task.client] = algorithm.finish(work)
                weight, end = len(self.partition.splits[task.client].train), ends[-1]
                if algorithm.tried:
                    end, _ = self._begun(algorithm, task.client, task.down, kept[task.client])
                if task.rated:
                    self.ended[task.client] = end
                replies.append(Reply(task.client, upload, weight, loss))
            self.store.keep(group[0].round, first + start, kept)
            yield from replies

    def score(self, models: Models) -> dict[str, Scores]:
        return self.evaluate(self.made(models))

    def answer(self, name: str, models: Models) -> dict[str, list[Answer]]:
        return self.answers(self.made(models))

    def export(self, models: Models, folders: Mapping[str, Path]) -> None:
        for client, tree in self.made(models):
            lora.save_adapter(self.model, tree, folders[client])

    def made(self, models: Models) -> Iterator[tuple[str, Tree]]:
        """The adapters that are named; personal ones a pass at a time."""
        algorithm, downs = models.algorithm, iter(models.downs)
        if models.kind == "end":
            yield from ((client, self.ended.pop(client)) for client, _ in downs)
        elif models.kind == "global":
            sent: Tree | None = None
            for client, down in downs:
                if down is not sent:  # all are sent the same
                    sent, tree = down, algorithm.start(self.adapter, down, {})
                yield client, tree
        else:
            while group := dict(itertools.islice(downs, self.width)):
                for (client, down), mine in zip(
                    group.items(), self.store.personal(list(group)), strict=True
                ):
                    yield client, self._begun(algorithm, client, down, mine)[0]

    def _begun(
        self, algorithm: Algorithm, client: str, down: Tree, mine: Tree
    ) -> tuple[Tree, int | None]:
        """What a client makes of its download and what it keeps; its place among the options."""
        options = algorithm.options(self.adapter, down, mine) if algorithm.options else ()
        scores = self._validated(client, options) if len(options) > 1 else ()
        if not scores:
            return algorithm.start(self.adapter, down, mine), None
        best = min(range(len(scores)), key=scores.__getitem__)
        return options[best], best

    def evaluate(self, models: Iterable[tuple[str, Tree]]) -> dict[str, Scores]:
        return {client: average(found) for client, found in self.answers(models).items()}

    def answers(self, models: Iterable[tuple[str, Tree]]) -> dict[str, list[Answer]]:
        """Neighbours with equal adapters share batches; within a round nothing is scored twice.

        What is remembered ends with the round: a resumed run scores exactly what an uninterrupted
        one does, in the same batches.
        """
        found: dict[str, list[Answer]] = {}
        work: list[tuple[str, Tree, list[str]]] = []
        labelled = ((digest(tree), client, tree) for client, tree in models)
        for key, group in itertools.groupby(labelled, key=lambda item: item[0]):
            _, clients, trees = zip(*group, strict=True)
            found |= {c: [] for c in clients}  # the order that was asked for
            known = {c: self._answers[c, key] for c in clients if (c, key) in self._answers}
            found |= known
            if fresh := [c for c in clients if c not in known]:
                work.append((key, trees[0], fresh))
            if len(work) == self.width:
                found |= self._answer_new(work)
                work = []
        return found | (self._answer_new(work) if work else {})

    def _answer_new(self, work: Sequence[tuple[str, Tree, list[str]]]) -> dict[str, list[Answer]]:
        """Answers of some adapters, each on the held-out rows of its clients; remembered."""
        held_out = [[self._held_out(c) for c in clients] for _, _, clients in work]
        models = [
            (tree, np.concatenate(rows)) for (_, tree, _), rows in zip(work, held_out, strict=True)
        ]
        found: dict[str, list[Answer]] = {}
        for (key, _, clients), rows, answers in zip(
            work, held_out, self._answer(models), strict=True
        ):
            rest = iter(answers)
            for client, own in zip(clients, rows, strict=True):
                found[client] = self._answers[client, key] = list(itertools.islice(rest, len(own)))
        return found

    def _held_out(self, client: str) -> np.ndarray:
        settings = self.config.eval
        return getattr(self.partition.splits[client], settings.split)[: settings.max_rows]

    def _path(self, phase: Phase, task: Task) -> dict[str, float]:
        """The learning rates of a phase's steps, summed."""
        settings, rows = self.config.train, self.partition.splits[task.client].train
        steps = (phase.steps or settings.steps(len(rows))) * settings.rate_scale(task.round)
        return {f: steps * rate for f, rate in settings.rates.items()}

    def _train(
        self,
        trees: Sequence[Tree],
        mines: Sequence[Tree],
        phases: Sequence[Phase],
        tasks: Sequence[Task],
    ) -> list[tuple[list[Tree], float]]:
        """Trains the clients of a pass: each one's adapter after every phase, and mean loss."""
        (tree,), (mine,), (task,) = trees, mines, tasks
        settings, rows = self.config.train, self.partition.splits[task.client].train
        lora.write(self.params, tree)
        self.model.train()
        losses: list[torch.Tensor] = []
        ends: list[Tree] = []
        optimizer: torch.optim.Optimizer | None = None
        for number, phase in enumerate(phases):
            if phase.begin:
                lora.write(self.params, phase.begin(task.down, mine, lora.read(self.params)))
            seed = (self.config.seed, task.round, task.client, number)
            torch.manual_seed(derive(*seed, "dropout"))
            trained = {n: p for n, p in self.params.items() if phase.trains(n)}
            for name, p in self.params.items():
                p.requires_grad_(name in trained)
            if optimizer is None or not phase.resumes:
                optimizer = make_optimizer(trained, settings, settings.rate_scale(task.round))
            extras = Extras(phase, [(task.down, mine)], trained)
            steps = phase.steps or settings.steps(len(rows))
            for batch in self._batches(rows, steps, seed):
                optimizer.zero_grad()
                weight, parts = self._weight(batch), pieces(batch, self.config.engine.micro_batch)
                step_loss = sum(self._backward_rows(part, weight) for part in parts)
                extras.before()
                if settings.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm)
                optimizer.step()
                extras.after()
                losses.append(torch.as_tensor(step_loss))
            ends.append(lora.read(self.params))
        return [(ends, torch.stack(losses).mean().item())]

    def _batches(
        self, rows: np.ndarray, steps: int, seed: tuple[int, int, str, int]
    ) -> Iterator[np.ndarray]:
        """A client's batches in a phase; ``seed``: the run's, the round, the client, the phase."""
        run, round_, _, number = seed
        length = Length(self.collator.length, derive(run, round_, number, "lengths"))
        by_length = length if self.config.train.sort_by_length else None
        size = self.config.train.batch_size
        return batches(rows, size, steps, derive(*seed, "batches"), by_length)

    def _backward_rows(self, rows: np.ndarray, weight: int) -> torch.Tensor:
        """Gradients of some of a batch's rows; their part of its mean loss.

        Args:
            rows: all of the batch, or a micro-batch.
            weight: of the whole batch.
        """
        loss = self._terms(rows).loss.sum() / weight
        loss.backward()
        return loss.detach()

    def _weight(self, rows: np.ndarray) -> int:
        """By what the rows' summed losses are divided."""
        return sum(self.objective.weight(self.collator.features(int(i))) for i in rows)

    @torch.no_grad()
    def _validated(self, client: str, trees: Sequence[Tree]) -> tuple[Validation, ...]:
        """The scores of some adapters on a client's validation rows, if it has any."""
        rows = self.partition.splits[client].val
        self.model.eval()
        return tuple(self._validation(trees, rows)) if len(rows) and trees else ()

    def _validation(self, trees: Sequence[Tree], rows: np.ndarray) -> list[Validation]:
        """The mean loss and the errors of each adapter on some rows."""
        found = []
        for tree in trees:
            self._put(tree)
            terms = [self._terms(batch) for batch in pieces(rows, self.config.eval.batch_size)]
            found += summed(terms, 1)
        return found

    def _put(self, tree: Tree) -> None:
        """Puts one adapter into the model."""
        lora.write(self.params, tree)

    def _check_finite(self, task: Task, end: Tree, loss: float) -> None:
        norms = torch.stack(torch._foreach_norm(list(end.values())))
        if not math.isfinite(loss) or not norms.isfinite().all():
            raise FedVLMError(
                f"client '{task.client}' diverged in round {task.round}: its loss is not finite; "
                "lower train.lr, or set train.max_grad_norm"
            )

    @torch.no_grad()
    def _answer(self, models: Sequence[tuple[Tree, np.ndarray]]) -> list[list[Answer]]:
        """What each adapter answers to its rows."""
        self.model.eval()
        found = []
        for tree, rows in models:
            lora.write(self.params, tree)
            batched = pieces(rows, self.config.eval.batch_size)
            found.append([answer for batch in batched for answer in self._answer_rows(batch)])
        return found

    def _terms(self, rows: np.ndarray) -> objectives.Terms:
        """The objective of the model as it is."""
        return self.objective.terms(self.model, self.collator.training(rows))

    def _texts(self, rows: np.ndarray) -> list[str]:
        """The decoded answers of the model as it is."""
        tokens = self.config.eval.max_new_tokens
        return greedy(self.model, self.collator.prompts(rows), self.collator.tokenizer, tokens)

    def _answer_rows(self, indices: np.ndarray) -> list[Answer]:
        """One batch: losses, texts and their scores."""
        terms, texts = self._terms(indices), self._texts(indices)
        rows = [self.collator.rows[int(i)] for i in indices]
        scores = score_texts(texts, [row["answer"] for row in rows])
        losses = {"loss": terms.loss / terms.weight, **terms.metrics, "weight": terms.weight}
        columns = {name: values.tolist() for name, values in losses.items()}
        return [
            {
                "row": int(row.get("row", index)),
                "group": _text(row.get(self.config.eval.group_by)),
                "reference": row["answer"],
                "prediction": texts[n],
                **scores[n],
                **{name: values[n] for name, values in columns.items()},
            }
            for n, (index, row) in enumerate(zip(indices, rows, strict=True))
        ]


def pieces(rows: np.ndarray, size: int | None) -> list[np.ndarray]:
    """The rows in order, ``size`` at a time; None: all at once."""
    size = size or len(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def summed(terms: Sequence[objectives.Terms], models: int) -> list[Validation]:
    """Scores from batches in which some models have as many rows each, one model after another."""
    loss, wrong, weight = (
        torch.cat([getattr(t, n).view(models, -1) for t in terms], 1).sum(1)
        for n in ("loss", "wrong", "weight")
    )
    pairs = zip((loss / weight).tolist(), (wrong / weight).tolist(), strict=True)
    return [Validation(*pair) for pair in pairs]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def batches(
    rows: np.ndarray, size: int, steps: int, seed: int, length: Length | None = None
) -> Iterator[np.ndarray]:
    """``steps`` batches: the rows shuffled, in pieces of ``size``, shuffled anew when used up.

    With ``length``, what a round takes of a shuffle is sorted before it is cut, and the pieces are
    shuffled: a batch holds rows of like length.

    Args:
        rows: the client's.
        size: rows of a batch.
        steps: how many.
        seed: of the shuffles of the rows.
        length: of a row, and the seed of the pieces' shuffles. Where that is the same for all,
            clients side by side have their long batches at the same step.
    """
    order, common = np.random.default_rng(seed), np.random.default_rng(length and length.seed)
    while steps:
        taken = order.permutation(rows)[: steps * size]
        if length:
            taken = taken[np.argsort([length.of(int(row)) for row in taken], kind="stable")]
        cut = pieces(taken, size)
        yield from (cut[n] for n in common.permutation(len(cut))) if length else cut
        steps -= len(cut)


def make_optimizer(
    trained: Mapping[str, torch.nn.Parameter], settings: TrainConfig, scale: float
) -> torch.optim.Optimizer:
    """A fresh optimizer, with its own rate for A and for B."""
    groups = [
        {"params": [p for n, p in trained.items() if factor(n) == f], "lr": rate * scale}
        for f, rate in settings.rates.items()
    ]
    groups = [g for g in groups if g["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    fused = next(iter(trained.values())).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused
    )

"""The cohort engine: many clients on one base in one pass.

The batches of the clients lie side by side, their factors are stacked (:mod:`fedvlm.models.stack`),
and one optimizer steps all clients. Each client has its own batches, loss, clipping and schedule,
so the adapters equal those of the reference engine up to rounding. Two cases cannot share a pass
exactly, and train one client at a time on the same stack: batches whose pictures have different
numbers of patches, and ``lora.dropout``, because each client has its own random stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedvlm.algorithms.base import Trained, Validation
from fedvlm.batches.draw import Batches, Part, beside, filled, parts_of, pieces
from fedvlm.batches.objectives import Terms, adapter_off
from fedvlm.batches.prompts import Features
from fedvlm.engines.base import Answer
from fedvlm.engines.continued import continued, reading
from fedvlm.engines.extras import Extras
from fedvlm.engines.memory import clients_in_a_pass, kept_for_backward
from fedvlm.engines.perunit import PerUnit
from fedvlm.engines.stacked import Session, Streams, clip, make_optimizer
from fedvlm.engines.together import Member, Outcome
from fedvlm.models.blocks import Ragged
from fedvlm.models.frozen import ImageFeatures
from fedvlm.models.generate import decoded, foretold, greedy
from fedvlm.models.load import identity
from fedvlm.models.norms import shorten
from fedvlm.models.runs import Runs
from fedvlm.models.spool import Spool
from fedvlm.models.stack import Stack
from fedvlm.seeds import derive
from fedvlm.tree import Tree, silent

Work = Callable[[np.ndarray], list[Any]]
"""Rows -> a result for each of them."""


class CohortEngine(PerUnit):
    """Trains and scores a whole pass of clients at once."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.stack = Stack(self.model)
        self._weights: dict[int, int] = {}  # row -> its weight in a loss
        shorten(self.model)
        self.device = self.collator.device
        self._images = self._frozen_images()
        if not self.plans:
            self._watch()
        self.width = self.config.engine.clients or self._fitting(self._batch_rows)

    def _train(self, group: Sequence[Member]) -> tuple[list[Outcome], Session, Sequence[Tensor]]:
        if self.plans:
            return self._train_units(group[0])
        begins, trains = [member.wanted.begin for member in group], group[0].wanted.trains
        steps = self._plan(group)
        if steps and not self._alone(steps[0][0]):
            self.collator.prefetch(steps[0][0].rows)
        self.stack.load(begins, self.device, trains)
        self._switch(training=True)
        session = self._session(group, self.stack.runs)
        losses, each = self._steps_of(group, session, steps)
        outcomes = [
            Outcome(Trained(tree, self._path(member)), own)
            for tree, member, own in zip(self.stack.trees(), group, losses, strict=True)
        ]
        return outcomes, session, [*self.stack.runs.all, each]

    def _session(self, group: Sequence[Member], runs: Runs) -> Session:
        """The optimizer of a stretch: a fresh one, or the optimizer of the previous stretch."""
        settings, first = self.config.train, group[0]
        scale = settings.rate_scale(first.task.round, first.task.visit.final)
        optimizer = make_optimizer(runs.of_factor(), settings, scale)
        fresh = Session(optimizer, runs.trained, len(group))
        if not first.wanted.resume or not first.resumable:
            return fresh
        places = [member.place for member in group]
        return first.session.resumed(fresh, places, first.resumable)

    def _steps_of(
        self, group: Sequence[Member], session: Session, steps: Sequence[list[Part]]
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Trains the loaded clients.

        Returns:
            The losses of each client, one a step, and the tensor that holds all losses.
        """
        limit, runs = self.config.train.max_grad_norm, self.stack.runs.all_trained
        extras = Extras([member.wanted for member in group], session.trained)
        streams = Streams(lambda k: derive(*self._seed(group[k]), "dropout"))
        losses, clients = [], list[int]()
        for number, parts in enumerate(steps):
            active = parts[0].drawn
            following = steps[number + 1][0] if number + 1 < len(steps) else None
            done = [k for k in range(len(group)) if k not in active]
            if number:
                session.leave(done)
            self.stack.runs.zero_grad()
            losses.append(self._backward(parts, following, streams))
            clients += active
            extras.before()
            if limit:
                clip(runs, limit)
            # The optimizer would still move a client that has done its steps; it is restored.
            kept = [run.detach()[:, done] for run in runs] if done else []
            session.optimizer.step()
            extras.after()
            with torch.no_grad():
                for run, ended in zip(runs, kept, strict=False):
                    run[:, done] = ended
        by_client = sorted(range(len(clients)), key=clients.__getitem__)
        each = torch.cat(losses)[by_client] if losses else torch.zeros(0)
        return each.split([clients.count(k) for k in range(len(group))]), each

    def _plan(self, group: Sequence[Member]) -> list[list[Part]]:
        """The micro-batches of each step, for the clients that still have steps to do."""
        drawn = [list(self._batches(member)) for member in group]
        active = (
            {k: own[n] for k, own in enumerate(drawn) if n < len(own)}
            for n in range(max(map(len, drawn)))
        )
        return [parts_of(batches, self.config.engine.micro_batch) for batches in active]

    def _backward(self, parts: Sequence[Part], following: Part | None, streams: Streams) -> Tensor:
        """Computes gradients of the sum of the clients' mean losses.

        Args:
            parts: the micro-batches of a step; the first has all active clients.
            following: the first micro-batch of the next step, which is collated meanwhile.
            streams: the random streams of the clients.

        Returns:
            The mean losses ``[active clients]``.
        """
        weights = dict.fromkeys(parts[0].drawn, 0)
        for part in parts:
            for k, rows in part.drawn.items():
                weights[k] += self._weight(rows)
        places = {k: place for place, k in enumerate(weights)}
        found: Tensor | None = None
        for part, after in zip(parts, [*parts[1:], following], strict=True):
            own = self._backward_part(part, after, weights, streams)
            if found is None:
                found = own
            else:
                at = torch.tensor([places[k] for k in part.drawn], device=own.device)
                found = found.index_add(0, at, own)
        assert found is not None, "a step has a batch"
        return found

    def _alone(self, part: Part) -> bool:
        """Whether the clients of a micro-batch are trained one after another."""
        return bool(self.config.lora.dropout) or not self._side_by_side(part.drawn)

    def _backward_part(
        self, part: Part, after: Part | None, weights: Mapping[int, int], streams: Streams
    ) -> Tensor:
        """The same for one micro-batch of each client; returns its part of each loss."""
        drawn, rows, size = part
        if self._alone(part):
            each = [self._backward_one(k, own, weights[k], streams) for k, own in drawn.items()]
            return torch.stack(each)
        self.stack.activate(list(drawn))
        try:
            terms = self._terms(rows)
        except Ragged:
            self._packed = True
            return self._backward_part(part, None, weights, streams)
        if after:
            self.collator.prefetch(after.rows)
        loss = terms.loss.view(len(drawn), size)
        if len(rows) > sum(map(len, drawn.values())):
            real = torch.tensor([[i < len(own) for i in range(size)] for own in drawn.values()])
            loss = loss * real.to(self.device)
        means = loss.sum(1) / torch.tensor([weights[k] for k in drawn], device=self.device)
        means.sum().backward()
        return means.detach()

    def _backward_one(self, client: int, rows: np.ndarray, weight: int, streams: Streams) -> Tensor:
        self.stack.activate([client])
        with streams.of(client):
            return self._backward_rows(rows, weight)

    def _backward_rows(self, rows: np.ndarray, weight: int) -> Tensor:
        """Computes gradients on rows of one client; returns their part of its mean loss.

        Args:
            rows: the batch, or a micro-batch.
            weight: the weight of the whole batch.
        """
        loss = self._terms(rows).loss.sum() / weight
        loss.backward()
        return loss.detach()

    def _weight(self, rows: np.ndarray) -> int:
        """Divisor of the summed row losses."""
        return sum(map(self._row_weight, rows.tolist()))

    def _row_weight(self, row: int) -> int:
        if row not in self._weights:
            self._weights[row] = self.objective.weight(self.collator.features(row))
        return self._weights[row]

    def _validate(self, trees: Sequence[Tree], rows: np.ndarray) -> list[Validation]:
        """Scores the adapters in one pass, like clients with the same rows."""
        share = max(1, self.config.eval.batch_size // len(trees))
        if len(trees) == 1 or not self._side_by_side({0: rows}):
            return self._validate_each(trees, rows)
        self.stack.load(trees, self.device)
        self.stack.activate(range(len(trees)))
        try:
            parts = [self._terms(np.tile(part, len(trees))) for part in pieces(rows, share)]
        except Ragged:
            self._packed = True
            return self._validate_each(trees, rows)
        return summed(parts, len(trees))

    def _validate_each(self, trees: Sequence[Tree], rows: np.ndarray) -> list[Validation]:
        """Scores one adapter after another."""
        found = []
        for tree in trees:
            self.stack.load([tree], self.device)
            self.stack.activate([0])
            terms = [self._terms(part) for part in pieces(rows, self.config.eval.batch_size)]
            found += summed(terms, 1)
        return found

    def _frozen_images(self) -> ImageFeatures | None:
        """The features of the pictures, where LoRA does not change them."""
        settings = self.config.engine
        if not settings.cache:
            return None
        spool = Spool(self.store.folder, settings.cache_disk * 2**20)
        inputs, budget = self.collator.picture, settings.cache * 2**20
        images = ImageFeatures(self.model, inputs, budget, spool, identity(self.config.model))
        self.stack.load([self.adapter], self.device)
        self.stack.activate([0])
        first = int(next(iter(self.partition.splits.values())).train[0])
        return images if images.usable(first) else None

    @torch.no_grad()
    def _watch(self) -> None:
        """Finds the layers that read one tensor. This is a function of the model alone."""
        rows = next(iter(self.partition.splits.values())).train[:1]
        self.stack.load([self.adapter], self.device)
        self.stack.activate([0])
        with self.stack.watching():
            self._terms(rows)

    @property
    def _batch_rows(self) -> int:
        """The most rows of a client in a pass."""
        return self.config.engine.micro_batch or self.config.train.batch_size

    def _fitting(self, size: int, most: int | None = None) -> int:
        """The number of clients, with ``size`` rows each, that fit into a pass; measured."""
        rows = next(iter(self.partition.splits.values())).train[:size]
        # A stack of one is computed differently.
        self.stack.load([self.adapter] * 2, self.device, lambda _: True)
        self.stack.activate([0, 1])
        twice = np.concatenate([filled(rows, size)] * 2)
        self._switch(training=True)
        try:
            activations = kept_for_backward(self.model, lambda: self._terms(twice).loss) // 2
        except Ragged:
            self.stack.activate([0])
            activations = kept_for_backward(self.model, lambda: self._terms(rows).loss)
        memory = self.config.engine.memory
        return clients_in_a_pass(memory, self.model, self.adapter, activations, most)

    def _known(self, rows: np.ndarray, copies: int) -> contextlib.AbstractContextManager[None]:
        if self._images is None:
            return contextlib.nullcontext()
        return self._images.given(list(rows) * copies)

    def _terms(self, rows: np.ndarray) -> Terms:
        """The objective on rows; the active clients' rows are blocks of equal size."""
        copies = 2 if self.objective.pairs else 1
        self._batch(rows, copies)
        with self._known(rows, copies):
            return self.objective.terms(self.model, self.collator.training(rows))

    def _texts(self, rows: np.ndarray) -> list[str]:
        self._batch(rows, copies=1)
        with self._known(rows, 1):
            tokens, tokenizer = self.config.eval.max_new_tokens, self.collator.tokenizer
            return greedy(self.model, self.collator.prompts(rows), tokenizer, tokens)

    def _rated(self, rows: np.ndarray) -> list[tuple[dict[str, float], str | None]]:
        """The losses of each row, and its answer; None where the model must be asked for it."""
        most, tokenizer = self.config.eval.max_new_tokens, self.collator.tokenizer
        with reading(self.model, most) as read:
            terms = self._terms(rows)
        assert terms.lead is not None, "no gradient is computed for scores"
        leads = terms.lead.tolist()
        answers = [self.collator.features(int(i)).answers[0] for i in rows]
        texts = foretold(self.model, answers, leads, tokenizer, most)
        if read:
            left = [n for n, text in enumerate(texts) if text is None]
            clients, use = self.stack.active, self.stack.narrow
            said = continued(self.model, read[0], answers, leads, left, most, clients, use)
            for n, text in zip(left, decoded(said, tokenizer), strict=True):
                texts[n] = text
        return list(zip(terms.rows(), texts, strict=True))

    def _batch(self, rows: np.ndarray, copies: int) -> None:
        self.stack.batch(len(rows), copies, lambda: self._uniform(rows))

    def _uniform(self, rows: np.ndarray) -> bool:
        """Whether all pictures of the rows have the same shape."""
        return uniform([self.collator.features(int(i)) for i in rows])

    def _side_by_side(self, drawn: Batches) -> bool:
        """Whether these batches may share a pass; layers that pack rows need equal shapes."""
        return not self._packed or self._uniform(np.concatenate(list(drawn.values())))

    def _answer(self, models: Sequence[tuple[Tree, np.ndarray]]) -> list[list[Answer]]:
        """Losses first; the model writes on where they do not tell the answer.

        Rows with answers of like length share a batch, because they are decoded for as long.
        """
        self.stack.load([tree for tree, _ in models], self.device)
        orders = [np.argsort(self.collator.letters[own], kind="stable") for _, own in models]
        rows = {k: own[orders[k]] for k, (_, own) in enumerate(models)}
        untuned = all(silent(tree) for tree, _ in models)
        with adapter_off(self.model) if untuned else contextlib.nullcontext():
            found = self._over(rows, self._rated)
            unknown = {k: rows[k][[text is None for _, text in own]] for k, own in found.items()}
            written = {k: iter(texts) for k, texts in self._over(unknown, self._texts).items()}
        answers: list[list[Answer]] = []
        for k, own in found.items():
            losses = [one for one, _ in own]
            texts = [next(written[k]) if text is None else text for _, text in own]
            recorded = self._recorded(rows[k], losses, texts)
            answers.append([recorded[at] for at in np.argsort(orders[k])])
        return answers

    def _over(self, left: Batches, work: Work) -> dict[int, list[Any]]:
        """Does the work on the rows of all clients, a pass at a time; gives one result a row."""
        found: dict[int, list[Any]] = {k: [] for k in left}
        while left := {k: rows for k, rows in left.items() if len(rows)}:
            share = max(1, self.config.eval.batch_size // len(left))
            drawn = {k: rows[:share] for k, rows in left.items()}
            left = {k: rows[share:] for k, rows in left.items()}
            for k, results in self._pass(drawn, work).items():
                found[k] += results
        return found

    def _pass(self, drawn: Batches, work: Work) -> dict[int, list[Any]]:
        """Does the work on a block of rows of each active client."""
        if len(drawn) > 1 and not self._side_by_side(drawn):
            alone = (self._pass({k: rows}, work) for k, rows in drawn.items())
            return {k: results for part in alone for k, results in part.items()}
        rows, size = beside(drawn)
        self.stack.activate(list(drawn))
        try:
            results = work(rows)
        except Ragged:
            self._packed = True
            return self._pass(drawn, work)
        return {k: results[n * size :][: len(real)] for n, (k, real) in enumerate(drawn.items())}


def uniform(rows: Sequence[Features]) -> bool:
    """Whether all pictures of the rows have the same shape: tensors, sizes and grids."""
    first = rows[0].extras
    return all(
        other.extras[k].shape == v.shape
        and (v.is_floating_point() or torch.equal(other.extras[k], v))
        for other in rows[1:]
        for k, v in first.items()
    )


def summed(terms: Sequence[Terms], models: int) -> list[Validation]:
    """Scores of ``models`` models, from batches with a block of equal size for each model."""
    loss, doubt, weight = (
        torch.cat([getattr(t, n).view(models, -1) for t in terms], 1).sum(1)
        for n in ("loss", "doubt", "weight")
    )
    pairs = zip((loss / weight).tolist(), (doubt / weight).tolist(), strict=True)
    return [Validation(*pair) for pair in pairs]

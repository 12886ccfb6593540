"""The common part of both engines: rounds, personal states, and the answers of the present round.

Each engine implements three methods: :meth:`Shell._train`, :meth:`Shell._validate` and
:meth:`Shell._answer`. The two implementations are independent, so that tests can compare them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedvlm.algorithms.base import Algorithm, Local, Validation
from fedvlm.batches import objectives
from fedvlm.batches.collate import Collator
from fedvlm.batches.draw import Length, batches
from fedvlm.data.partition import Partition
from fedvlm.engines.base import Answer, Models, Scores
from fedvlm.engines.functions import Function, own_scores
from fedvlm.engines.stages import Stage, joined, packed, parted
from fedvlm.engines.together import Member, Outcome, check_finite, perform
from fedvlm.engines.untuned import Untuned
from fedvlm.engines.wire import Forms, Reply, Task
from fedvlm.errors import FedVLMError
from fedvlm.metrics import average, rounded, score_texts
from fedvlm.models import lora
from fedvlm.privacy.chance import Chance, System, poisson, some
from fedvlm.privacy.plan import Plan
from fedvlm.privacy.units import units_of
from fedvlm.seeds import derive
from fedvlm.settings.sections import Config
from fedvlm.store.run import Store
from fedvlm.tree import Tree, digest, silent

MOST_VALIDATED = 64  # validation rows of a client that a Score uses
UNTUNED = ""  # in place of the digest of an adapter that changes nothing


class Shell:
    """Clients on one model in memory, a pass of ``width`` clients at a time.

    Args:
        model: the frozen base with LoRA attached.
        collator: makes batches of the rows.
        partition: client -> rows.
        config: the settings of the run.
        store: keeps the personal states.
        algorithm: the algorithm of the run.
        stages: the stages of the wire.

    Attributes:
        width: clients in a pass.
        adapter: the common initial adapter.
        forms: the required form of downloads.
        ended: client -> the adapter at the end of its training, for ``rated`` tasks, until scored.
        score_step: step to which the validation scores are rounded that an algorithm gets, because
            it may upload them; 0: not rounded. A deployed site sets it.
        plans: client -> its plan of differential privacy; empty: plain training. Clients then train
            one after another by DP-SGD (Abadi et al., arXiv 1607.00133), each in one pass of units.
        chance: the source of samples and noise.
        functions: name -> metric of the program that started the run.
    """

    width = 1
    secure = False

    def __init__(
        self,
        model: Any,
        collator: Collator,
        partition: Partition,
        config: Config,
        store: Store,
        algorithm: Algorithm,
        stages: tuple[Stage, ...] = (),
    ):
        self.model, self.collator, self.partition = model, collator, partition
        self.config, self.store = config, store
        self.algorithm, self.stages = algorithm, stages
        self.adapter = lora.read(lora.handles(model))
        self.objective = objectives.build(config.objective)
        self.forms = Forms(algorithm, self.adapter, stages)
        self.ended: dict[str, Tree] = {}
        self.score_step = 0.0
        self.plans: Mapping[str, Plan] = {}
        self.chance: Chance = System()
        self.functions: Mapping[str, Function] = {}
        self._units: dict[str, list[np.ndarray]] = {}
        self._passes: Counter[str] = Counter()
        self._answers: dict[tuple[str, str], list[Answer]] = {}
        self._untuned = Untuned(type(self).__name__, model, collator, config)
        self._trains: bool | None = None

    # -- implemented by each engine

    def _train(self, group: Sequence[Member]) -> tuple[list[Outcome], Any, Sequence[Tensor]]:
        """Trains clients whose requests are of one kind; see :mod:`fedvlm.engines.together`.

        Returns:
            Outcomes, the optimizer's session, and tensors that hold all factors and losses of the
            outcomes, or the parameters of which the factors are copies.
        """
        raise NotImplementedError

    def _validate(self, trees: Sequence[Tree], rows: np.ndarray) -> list[Validation]:
        """The mean loss and the share of errors of each adapter on some rows."""
        raise NotImplementedError

    def _answer(self, models: Sequence[tuple[Tree, np.ndarray]]) -> list[list[Answer]]:
        """The answers of each adapter to its rows."""
        raise NotImplementedError

    # -- rounds

    def train(
        self, tasks: Sequence[Task], *, first: int = 0, fresh: bool = True
    ) -> Iterator[Reply]:
        """Trains like :meth:`fedvlm.engines.base.Engine.train`, also a part of a round's cohort.

        Args:
            tasks: the tasks of the part.
            first: the position of the first task in the cohort.
            fresh: whether the round begins.
        """
        if fresh:
            self._answers.clear()
            self.ended.clear()
        width = 1 if self.plans else self.width
        for start in range(0, len(tasks), width):
            group = tasks[start : start + width]
            for task in group:
                self.forms.check_download(task.visit, task.down)
            stored = self.store.personal([task.client for task in group])
            personal = [parted(tree) for tree in stored]
            members = [
                self._member(task, mine) for task, (mine, _) in zip(group, personal, strict=True)
            ]
            self._passes.clear()
            perform(members, self._trained, self._validated)
            replies, kept = [], {}
            for member, (_, memory) in zip(members, personal, strict=True):
                reply, kept[member.task.client] = self._reply(member, memory)
                replies.append(reply)
            self.store.keep(group[0].round, first + start, kept)
            yield from replies

    def _member(self, task: Task, mine: Tree) -> Member:
        rows = len(self.partition.splits[task.client].train)
        begin = self.algorithm.model(self.adapter, task.down, mine)
        steps = self.config.train.steps(rows, task.visit.final)
        local = Local(task.visit, begin, task.down, mine, steps)
        return Member(task, self.algorithm.work(local))

    def _trained(self, group: Sequence[Member]) -> tuple[list[Outcome], Any]:
        wanted = group[0].wanted
        if not any(map(wanted.trains, wanted.begin)):
            raise FedVLMError("the algorithm asks for training of no factor of the adapter")
        for member in group:
            self._check_whole(member.task.client, member.wanted.begin)
        outcomes, session, values = self._train(group)
        check_finite(group, outcomes, values)
        return outcomes, session

    def _switch(self, training: bool) -> None:
        """Switches to training or to evaluation, which visits all modules, unless it is done."""
        if self._trains is not training or self.model.training is not training:
            self.model.train(training)
            self._trains = training

    def _check_whole(self, client: str, tree: Tree) -> None:
        """Refuses a request whose adapter lacks a factor or has one of another shape."""
        if tree.keys() != self.adapter.keys():
            odd = sorted(tree.keys() ^ self.adapter.keys())
            raise FedVLMError(
                f"client '{client}': the algorithm asks for an adapter with other factors than the "
                f"model's, {len(odd)} of them, '{odd[0]}' first; a request takes a whole adapter"
            )
        for name, tensor in tree.items():
            if tensor.shape != self.adapter[name].shape:
                raise FedVLMError(
                    f"client '{client}': the algorithm asks for '{name}' as {list(tensor.shape)}, "
                    f"and the model has {list(self.adapter[name].shape)}"
                )

    def _validated(self, client: str, trees: Sequence[Tree]) -> tuple[Validation, ...]:
        if self.plans:
            raise FedVLMError(
                f"client '{client}': the algorithm asks for scores on validation rows, which have "
                "no noise: differential privacy (privacy.unit) does not allow this algorithm"
            )
        for tree in trees:
            self._check_whole(client, tree)
        rows = self.partition.splits[client].val[:MOST_VALIDATED]
        if not len(rows) or not trees:
            return ()
        self._passes[client] += len(rows) * len(trees)
        self._switch(training=False)
        with torch.no_grad():
            found = self._validate(trees, rows)
        return tuple(Validation(*(rounded(x, self.score_step) for x in one)) for one in found)

    def _reply(self, member: Member, memory: Mapping[str, Tree]) -> tuple[Reply, Tree]:
        """The reply of a client, and the state that it stores."""
        task, sent = member.task, member.sent
        upload, memory = packed(self.stages, sent.up, task.down, memory, task.visit)
        if task.rated:
            # A client that sends nothing has its final model; else the trained adapter counts.
            own = self.algorithm.model(self.adapter, task.down, sent.keep)
            self.ended[task.client] = member.end if sent.up and member.end else own
        losses = torch.cat(member.losses) if member.losses else torch.zeros(0)
        loss = losses.mean().item() if len(losses) else 0.0
        # Under differential privacy, the number of rows is not for the server.
        private = self.config.privacy.unit is not None
        weight = 1 if private else len(self.partition.splits[task.client].train)
        counts = len(losses), self._passes[task.client]
        return Reply(task.client, upload, weight, loss, *counts), joined(sent.keep, memory)

    # -- stretches of training, for both engines

    def _seed(self, member: Member) -> tuple[int, int, str, int]:
        """The seed of a stretch: the run's seed, the round, the client, the stretch's number."""
        task = member.task
        return self.config.seed, task.round, task.client, member.stretches

    def _steps(self, member: Member) -> int:
        rows = self.partition.splits[member.task.client].train
        wanted = member.wanted.steps
        if wanted is not None:
            return wanted
        return self.config.train.steps(len(rows), member.task.visit.final)

    def _batches(self, member: Member) -> Iterator[np.ndarray]:
        """The batches of a client in its next stretch."""
        seed, settings = self._seed(member), self.config.train
        run, round_, _, number = seed
        by_length = None
        if settings.sort_by_length:
            seed_of_turns = derive(run, round_, number, "lengths")
            by_length = Length(self.collator.length, seed_of_turns)
        rows = self.partition.splits[member.task.client].train
        steps = self._steps(member)
        drawn = batches(rows, settings.batch_size, steps, derive(*seed, "batches"), by_length)
        for batch in drawn:
            self._passes[member.task.client] += len(batch)
            yield batch

    def _samples(self, member: Member) -> list[list[np.ndarray]]:
        """The Poisson samples of a client's next stretch: for each step, the rows of each unit."""
        client = member.task.client
        plan, units = self.plans[client], self.units(client)
        most = self.config.privacy.unit_rows
        found = []
        for _ in range(self._steps(member)):
            chosen = poisson(self.chance, len(units), plan.rate)
            found.append([some(self.chance, units[k], most) for k in chosen])
            self._passes[client] += sum(map(len, found[-1]))
        return found

    def units(self, client: str) -> list[np.ndarray]:
        """The protected units among the training rows of a client."""
        if client not in self._units:
            rows = self.partition.splits[client].train
            self._units[client] = units_of(self.collator.rows, rows, self.config.privacy.column)
        return self._units[client]

    def _path(self, member: Member) -> dict[str, float]:
        """The sum of the learning rates over the steps of the next stretch, by factor."""
        settings = self.config.train
        scale = self._steps(member) * settings.rate_scale(
            member.task.round, member.task.visit.final
        )
        return {factor: scale * rate for factor, rate in settings.rates.items()}

    # -- scores

    def score(self, models: Models) -> dict[str, Scores]:
        return self.evaluate(self.made(models))

    def answer(self, name: str, models: Models) -> dict[str, list[Answer]]:
        return self.answers(self.made(models))

    def validate(self, models: Models) -> dict[str, float]:
        found = {}
        self._switch(training=False)
        with torch.no_grad():
            for client, tree in self.made(models):
                if len(rows := self.partition.splits[client].val[:MOST_VALIDATED]):
                    found[client] = self._validate([tree], rows)[0].loss
        return found

    def export(self, models: Models, folders: Mapping[str, Path]) -> None:
        for client, tree in self.made(models):
            lora.save_adapter(self.model, tree, folders[client])

    def made(self, models: Models) -> Iterator[tuple[str, Tree]]:
        """The named adapters by client; personal states are read a pass at a time."""
        downs = iter(models.downs)
        if models.kind == "end":
            yield from ((visit.client, self.ended.pop(visit.client)) for visit, _ in downs)
        elif models.kind == "global":
            sent: Tree | None = None
            for visit, down in downs:
                if down is not sent:  # all clients get the same download
                    sent, tree = down, self.algorithm.model(self.adapter, down, {})
                yield visit.client, tree
        else:
            while group := list(itertools.islice(downs, self.width)):
                stored = self.store.personal([visit.client for visit, _ in group])
                for (visit, down), tree in zip(group, stored, strict=True):
                    yield visit.client, self.algorithm.model(self.adapter, down, parted(tree)[0])

    def evaluate(self, models: Iterable[tuple[str, Tree]]) -> dict[str, Scores]:
        """Mean scores of adapters, by client."""
        return {client: average(found) for client, found in self.answers(models).items()}

    def answers(self, models: Iterable[tuple[str, Tree]]) -> dict[str, list[Answer]]:
        """Answers by client; neighbours with equal adapters share batches.

        Within a round, no adapter is scored twice on the same rows. The remembered answers end with
        the round, so a resumed run scores the same batches as an uninterrupted run. Adapters that
        change nothing give the untuned model, see :mod:`fedvlm.engines.untuned`.
        """
        found: dict[str, list[Answer]] = {}
        work: list[tuple[str, Tree, list[str]]] = []
        labelled = (
            (UNTUNED if silent(tree) else digest(tree), client, tree) for client, tree in models
        )
        for key, group in itertools.groupby(labelled, key=lambda item: item[0]):
            _, clients, trees = zip(*group, strict=True)
            found |= {c: [] for c in clients}  # keeps the order of the request
            known = {c: self._answers[c, key] for c in clients if (c, key) in self._answers}
            found |= known
            fresh = [c for c in clients if c not in known]
            if fresh and key == UNTUNED:
                found |= self._answer_new([(key, trees[0], fresh)])  # in batches of its own
            elif fresh:
                work.append((key, trees[0], fresh))
            if len(work) == self.width:
                found |= self._answer_new(work)
                work = []
        return found | (self._answer_new(work) if work else {})

    def _answer_new(self, work: Sequence[tuple[str, Tree, list[str]]]) -> dict[str, list[Answer]]:
        """Answers of some adapters to the held-out rows of their clients; remembers them."""
        held_out = [[self._held_out(c) for c in clients] for _, _, clients in work]
        models = [
            (tree, np.concatenate(rows)) for (_, tree, _), rows in zip(work, held_out, strict=True)
        ]
        # A program's functions have no name that another run could trust.
        untuned = work[0][0] == UNTUNED and not self.functions
        answered = self._untuned.get(models[0][1]) if untuned else None
        if answered is None:
            self._switch(training=False)
            with torch.no_grad():
                answered = self._answer(models)
            if untuned:
                self._untuned.keep(models[0][1], answered)
        found: dict[str, list[Answer]] = {}
        for (key, _, clients), rows, answers in zip(work, held_out, answered, strict=True):
            rest = iter(answers)
            for client, own in zip(clients, rows, strict=True):
                found[client] = self._answers[client, key] = list(itertools.islice(rest, len(own)))
        return found

    def _held_out(self, client: str) -> np.ndarray:
        settings = self.config.eval
        return getattr(self.partition.splits[client], settings.split)[: settings.max_rows]

    def _recorded(
        self, indices: np.ndarray, losses: Sequence[Mapping[str, float]], texts: Sequence[str]
    ) -> list[Answer]:
        """The answers to some rows, from their losses (:meth:`Terms.rows`) and texts."""
        rows = [self.collator.rows[int(i)] for i in indices]
        scores = score_texts(texts, [row["answer"] for row in rows])
        return [
            {
                "row": int(row.get("row", index)),
                "group": _text(row.get(self.config.eval.group_by)),
                "reference": row["answer"],
                "prediction": texts[n],
                **scores[n],
                **own_scores(self.functions, texts[n], row),
                **losses[n],
            }
            for n, (index, row) in enumerate(zip(indices, rows, strict=True))
        ]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)

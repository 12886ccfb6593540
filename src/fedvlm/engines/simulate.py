"""simulate(): an algorithm on clients whose loss is a formula, without a model or data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedvlm.algorithms.base import (
    NOBODY,
    Algorithm,
    Ask,
    Gathered,
    Local,
    Score,
    Sent,
    Train,
    Trained,
    Upload,
    Validation,
    Visit,
    expected,
    step,
)
from fedvlm.engines.stages import Stage, opened, packed
from fedvlm.errors import FedVLMError
from fedvlm.tree import Mean, Tree

if TYPE_CHECKING:
    from torch import Tensor

Gradient = Callable[[str, "Tensor"], "Tensor"]
"""``(name, factor) -> gradient`` of a client's loss."""


def simulate(
    algorithm: Algorithm,
    clients: Mapping[str, tuple[float, Gradient]],
    initial: Tree,
    rounds: int = 0,
    *,
    steps: int = 1,
    lr: float = 0.1,
    validation: Mapping[str, Callable[[Tree], Validation]] | None = None,
    stages: Sequence[Stage] = (),
) -> Simulation:
    """Runs federated rounds by plain SGD, in one process and without files.

    Args:
        algorithm: what the clients run.
        clients: name -> (number of training examples, gradient of the loss by factor).
        initial: the common adapter: PEFT's names of factors -> ``[rank, in]`` or ``[out, rank]``.
        rounds: the number of rounds to run now; :meth:`Simulation.run` runs more.
        steps: the usual number of optimizer steps of a round.
        lr: the learning rate.
        validation: client -> function that scores an adapter on the client's validation rows; a
            client without an entry has no validation rows.
        stages: the stages of the wire, such as compression.
    """
    return Simulation(
        expected(algorithm), clients, initial, steps, lr, validation or {}, stages
    ).run(rounds)


class Simulation:
    """Federated rounds of an algorithm on clients whose loss is a formula.

    Attributes:
        state: the state of the server.
        kept: client -> the state that its algorithm keeps.
        memory: client -> the memories of the wire's stages.
        round: the last round, from 1.
        messages: client -> its last message.
        uploads: client -> the upload that the server read from this message.
        ends: client -> the adapters after each stretch of training in its last round.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        clients: Mapping[str, tuple[float, Gradient]],
        initial: Tree,
        steps: int,
        lr: float,
        validation: Mapping[str, Callable[[Tree], Validation]],
        stages: Sequence[Stage],
    ):
        self.algorithm, self.clients, self.initial = algorithm, dict(clients), initial
        self.steps, self.lr, self.validation, self.stages = steps, lr, validation, stages
        self.state = algorithm.init(initial)
        self.kept: dict[str, Tree] = {c: {} for c in clients}
        self.memory: dict[str, dict[str, Tree]] = {c: {} for c in clients}
        self.messages: dict[str, Tree] = {}
        self.uploads: dict[str, Tree] = {}
        self.ends: dict[str, list[Tree]] = {}
        self.round, self.over = 0, False

    def run(self, rounds: int = 1, cohort: Iterable[str] | None = None) -> Simulation:
        """Runs more rounds with the clients of ``cohort``; None: with all clients."""
        names = list(self.clients if cohort is None else cohort)
        if rounds and self.over:
            raise FedVLMError("the final round is over: no round follows it")
        for _ in range(rounds):
            self._round(names)
        return self

    def finish(self) -> Simulation:
        """Runs the final round with all clients, if the algorithm has one."""
        if self.algorithm.final and not self.over:
            self.over = True
            self._round(list(self.clients))
        return self

    def model(self, client: str = "") -> Tree:
        """The present model of a client; without a name, the global model."""
        visit = self._visit(client)
        down = self.algorithm.send(self.state, visit)
        return self.algorithm.model(self.initial, down, self.kept.get(client, {}))

    def _visit(self, client: str, sampled: float = 1.0) -> Visit:
        weight = self.clients[client][0] if client in self.clients else NOBODY.weight
        return Visit(client, weight, sampled, self.round, self.over)

    def _round(self, cohort: Sequence[str]) -> None:
        self.round += 1
        everyone = sum(weight for weight, _ in self.clients.values())
        sampled = sum(self.clients[c][0] for c in cohort) / everyone
        uploads = []
        for client in cohort:
            visit = self._visit(client, sampled)
            down = self.algorithm.send(self.state, visit)
            sent = self._work(visit, down)
            message, self.memory[client] = packed(
                self.stages, sent.up, down, self.memory[client], visit
            )
            self.kept[client], self.messages[client] = sent.keep, message
            self.uploads[client] = opened(self.stages, message, down)
            uploads.append(Upload(visit, self.uploads[client]))
        self._aggregate([u for u in uploads if u.tree])

    def _aggregate(self, uploads: Sequence[Upload]) -> None:
        server, mean = self.algorithm.server, Mean()
        if not uploads:
            return
        if isinstance(server, Gathered):
            changes = server.update(self.state, uploads, self.round)
        else:
            for upload in uploads:
                mean.add(*server.lift(upload.tree, upload.visit))
            changes = server.update(self.state, mean.tree(), self.round)
        self.state = {**self.state, **changes}

    def _work(self, visit: Visit, down: Tree) -> Sent:
        mine = self.kept[visit.client]
        begin = self.algorithm.model(self.initial, down, mine)
        program = self.algorithm.work(Local(visit, begin, down, mine, self.steps))
        self.ends[visit.client] = []
        ask: Ask | Sent = step(program)
        while not isinstance(ask, Sent):
            if isinstance(ask, Score):
                score = self.validation.get(visit.client)
                ask = step(program, tuple(map(score, ask.trees)) if score else ())
            else:
                end = self._train(visit.client, ask)
                self.ends[visit.client].append(end)
                count = self.steps if ask.steps is None else ask.steps
                ask = step(program, Trained(end, dict.fromkeys("AB", self.lr * count)))
        return ask

    def _train(self, client: str, ask: Train) -> Tree:
        """Trains by plain SGD on the client's formula."""
        gradient = self.clients[client][1]
        now = {n: t.clone() for n, t in ask.begin.items()}
        for _ in range(self.steps if ask.steps is None else ask.steps):
            for name in filter(ask.trains, ask.begin):
                slope = gradient(name, now[name])
                for term in ask.terms:
                    if name in term.constant:
                        slope = slope + term.constant[name] + term.rate * now[name]
                if ask.mask:
                    slope = slope * ask.mask(name, now[name])
                now[name] = now[name] - self.lr * slope
        return now

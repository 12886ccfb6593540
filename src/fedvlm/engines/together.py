"""Runs the programs of a pass of clients; equal requests for training are served together.

A program is the client's side of an algorithm, a generator. Each program runs until it asks for
training. Clients whose requests are of one kind train together, and their programs then continue
with the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fedvlm.algorithms.base import Ask, Program, Score, Sent, Train, Trained, Validation, step
from fedvlm.engines.wire import Task
from fedvlm.errors import FedVLMError
from fedvlm.tree import Tree

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Member:
    """A client of a pass, and the state of its program.

    Attributes:
        task: the client's work.
        program: the client's side of the algorithm.
        ask: the open request of the program, or its result.
        stretches: number of stretches of training so far.
        losses: of each stretch so far, the loss of every step ``[steps]``.
        end: the adapter after the last stretch; empty before the first.
        session: the engine's optimizer of the last stretch, shared by the clients of that stretch.
        place: the client's place in that stretch.
        resumable: number of the client's steps with that optimizer.
        trained: the names of the factors of the last stretch.
    """

    task: Task
    program: Program
    ask: Ask | Sent | None = None
    stretches: int = 0
    losses: list[Tensor] = field(default_factory=list)
    end: Tree = field(default_factory=dict)
    session: Any = None
    place: int = 0
    resumable: int = 0
    trained: tuple[str, ...] = ()

    @property
    def wanted(self) -> Train:
        """The open request for training."""
        assert isinstance(self.ask, Train)
        return self.ask

    @property
    def sent(self) -> Sent:
        """The result of the round."""
        assert isinstance(self.ask, Sent)
        return self.ask


class Outcome(NamedTuple):
    """A client's stretch of training.

    Attributes:
        trained: the result for the client's program.
        losses: the loss of every step ``[steps]``.
    """

    trained: Trained
    losses: Tensor


TrainTogether = Callable[[Sequence[Member]], tuple[list[Outcome], Any]]
"""Trains clients whose requests are of one kind; returns outcomes and the optimizer's session."""

Validate = Callable[[str, Sequence[Tree]], tuple[Validation, ...]]
"""``(client, adapters) -> scores`` on the client's validation rows; ``()`` without such rows."""


def perform(members: Sequence[Member], train: TrainTogether, validate: Validate) -> None:
    """Runs all programs to their end.

    Raises:
        FedVLMError: a stretch resumes the optimizer of a stretch that trained other factors.
    """
    session: Any = None
    for member in members:
        member.ask = step(member.program)
    while True:
        for member in members:
            while isinstance(member.ask, Score):
                scores = validate(member.task.client, member.ask.trees)
                member.ask = step(member.program, scores)
        waiting = [member for member in members if isinstance(member.ask, Train)]
        if not waiting:
            for member in members:
                member.session = None
            return
        kinds = [_kind(member) for member in waiting]
        behind = min(range(len(waiting)), key=lambda k: waiting[k].stretches)  # nobody falls back
        kind = kinds[behind]
        group = [member for member, own in zip(waiting, kinds, strict=True) if own == kind]
        if not group[0].wanted.resume:
            session = None  # the optimizers of before are freed before the next one is made
            for member in group:
                member.session = None
        outcomes, session = train(group)
        for place, (member, outcome) in enumerate(zip(group, outcomes, strict=True)):
            resumed = member.resumable if member.wanted.resume else 0
            member.session, member.place = session, place
            member.trained = kind[0]
            member.resumable = resumed + len(outcome.losses)
            member.stretches += 1
            member.losses.append(outcome.losses)
            member.end = outcome.trained.end
            member.ask = step(member.program, outcome.trained)


def check_finite(
    members: Sequence[Member], outcomes: Sequence[Outcome], values: Sequence[Tensor]
) -> None:
    """Refuses a loss or a factor that is not finite; looks at single clients only to name one.

    Args:
        members: the clients of the outcomes.
        outcomes: their stretches.
        values: tensors that hold the numbers of all outcomes together.

    Raises:
        FedVLMError: a client diverged.
    """
    if _finite(values):
        return
    for member, outcome in zip(members, outcomes, strict=True):
        if not _finite([*outcome.trained.end.values(), outcome.losses]):
            raise FedVLMError(
                f"client '{member.task.client}' diverged in round {member.task.round}: its loss is "
                "not finite; lower train.lr, or set train.max_grad_norm"
            )


def _finite(values: Sequence[Tensor]) -> bool:
    """Whether the norms of all tensors are finite."""
    import torch

    with torch.no_grad():
        return all(norm.isfinite() for norm in torch._foreach_norm(list(values)))


def _kind(member: Member) -> tuple[Any, ...]:
    """The kind of a request: clients of equal kinds can train together."""
    ask = member.wanted
    trained = tuple(sorted(name for name in ask.begin if ask.trains(name)))
    if ask.resume and member.stretches and trained != member.trained:
        raise FedVLMError(
            f"client '{member.task.client}': the algorithm resumes the optimizer of a stretch that "
            f"trained other factors ({len(member.trained)} then, {len(trained)} now); a resumed "
            "stretch must train the same factors"
        )
    terms = tuple((term.rate, frozenset(term.constant)) for term in ask.terms)
    if not ask.resume:
        return trained, terms
    idle = ask.steps == 0  # an idle client's moments must not move with the others'
    return trained, terms, id(member.session), member.resumable, idle

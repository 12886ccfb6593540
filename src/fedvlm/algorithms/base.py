"""The protocol: an algorithm is a frozen value of pure functions.

It holds no counter, no random state and no client data, and is cut at the wire: no function sees
both the server's state and a client's data. The style is optax's and fedjax's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from fedvlm.tree import Select, Tree

if TYPE_CHECKING:
    from torch import Tensor

State = Tree
"""What the server keeps between rounds: named tensors, so that a checkpoint is one file."""


@dataclass(frozen=True)
class Client:
    """What the server knows of a client.

    Attributes:
        name: its name in the partition; empty for nobody in particular, whose download is the
            global model.
        weight: its weight in a mean, the number of its training examples.
        sampled: the share of all clients' examples that this round's cohort has.
    """

    name: str
    weight: float
    sampled: float = 1.0


NOBODY = Client("", 1.0)


@dataclass(frozen=True)
class Upload:
    """What the server got from a client."""

    client: Client
    tree: Tree


@dataclass(frozen=True)
class Term:
    """An extra gradient, ``rate * now + constant``, on the factors that ``constant`` names.

    Attributes:
        constant: ``(down, mine) -> tree``.
        rate: of the factors as they are.
    """

    constant: Callable[[Tree, Tree], Tree]
    rate: float = 0.0


@dataclass(frozen=True)
class Phase:
    """One stretch of local training.

    Attributes:
        trains: takes the names of the factors that are trained; the others are constant.
        steps: optimizer steps, or None for the length that ``train`` in the config says.
        resumes: goes on with the optimizer of the phase before, which trained the same factors and
            had ``steps``: clients side by side share an optimizer, which counts steps for all.
        begin: ``(down, mine, now) -> tree``: the adapter that this phase begins with; None goes on
            with the one that the phase before has left.
        terms: extra gradients, added before clipping.
        mask: ``(name, factor) -> mask``, true where elements of a trained factor are trained;
            it broadcasts to ``[..., rank, in]`` or ``[..., out, rank]``. None: everywhere.
    """

    trains: Select
    steps: int | None = None
    resumes: bool = False
    begin: Callable[[Tree, Tree, Tree], Tree] | None = None
    terms: tuple[Term, ...] = ()
    mask: Callable[[str, Tensor], Tensor] | None = None


class Validation(NamedTuple):
    """What an adapter is worth on a client's validation rows; the lower the better.

    Attributes:
        loss: in nats a token, or DPO's.
        wrong: the share of the answers' tokens that are not the likeliest, or of pairs whose
            rejected answer is preferred.
    """

    loss: float
    wrong: float


@dataclass(frozen=True)
class Work:
    """What a client has done in a round.

    Attributes:
        down: what it was sent.
        mine: what it kept before.
        ends: its whole adapter after each phase; the last one is its model.
        start: its adapter before the first phase.
        chosen: the place among the algorithm's ``options`` of the one that it began with; None
            where ``start`` decided.
        scores: on the client's validation rows, of the adapters that the algorithm has ``tried``;
            empty without such rows.
        paths: of each phase, the sum of the learning rates of all steps, by factor (A, B).
    """

    down: Tree
    mine: Tree
    ends: tuple[Tree, ...]
    paths: tuple[Mapping[str, float], ...] = ()
    start: Tree = field(default_factory=dict)
    chosen: int | None = None
    scores: tuple[Validation, ...] = ()

    @property
    def end(self) -> Tree:
        """The adapter after the last phase."""
        return self.ends[-1]


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm over LoRA factors.

    Attributes:
        init: ``(adapter) -> state``; server, once, from the common initial adapter.
        download: ``(state, client) -> down``; server: what this client is sent.
        start: ``(adapter, down, mine) -> tree``; client: the whole adapter to train or evaluate,
            from the common initial adapter, the download, and what it keeps (empty at first).
        phases: client: what trains, and how long.
        finish: ``(work) -> (upload, mine)``; client: what leaves it, what stays.
        update: ``(state, mean) -> state``; server, from the weighted mean of the uploads.
        decode: ``(message, down) -> upload``; server: what a client sends as it was before it was
            compressed; ValueError where no client can have made the message.
        lift: ``(upload, client) -> tree``; server: what of an upload enters the mean.
        gather: ``(state, uploads) -> state``; server: in place of the mean and ``update``, where
            an algorithm needs every upload of a round at once.
        turns: the algorithms of rounds 1, 2, ... where these alternate; the last is followed by
            the first. They have this one's ``init``.
        final: the algorithm of one last round over all clients, for local tuning at the end.
        options: ``(adapter, down, mine) -> trees``; client: what it chooses from in place of
            ``start``: the adapter with the lowest loss on its validation rows. Without such rows,
            and with fewer than two of them, ``start`` decides.
        tried: ``(work) -> trees``; client: the adapters whose validation scores ``finish`` needs; a
            client's model is then what ``start`` makes of what it keeps.
    """

    init: Callable[[Tree], State]
    download: Callable[[State, Client], Tree]
    start: Callable[[Tree, Tree, Tree], Tree]
    phases: tuple[Phase, ...]
    finish: Callable[[Work], tuple[Tree, Tree]]
    update: Callable[[State, Tree], State]
    decode: Callable[[Tree, Tree], Tree] = lambda message, down: message
    lift: Callable[[Tree, Client], Tree] = lambda upload, client: upload
    gather: Callable[[State, Sequence[Upload]], State] | None = None
    turns: tuple[Algorithm, ...] = ()
    final: Algorithm | None = None
    options: Callable[[Tree, Tree, Tree], Sequence[Tree]] | None = None
    tried: Callable[[Work], Sequence[Tree]] | None = None

    def at(self, round_: int) -> Algorithm:
        """The algorithm of a round, from 1."""
        return self.turns[(round_ - 1) % len(self.turns)] if self.turns else self

    @property
    def last(self) -> Algorithm:
        """That of the last round, which says what clients have when the run is over."""
        return self.final or self


def everywhere(change: Callable[[Algorithm], Algorithm], algorithm: Algorithm) -> Algorithm:
    """``change`` made to an algorithm, to its turns and to its last round."""
    return replace(
        change(algorithm),
        turns=tuple(everywhere(change, turn) for turn in algorithm.turns),
        final=everywhere(change, algorithm.final) if algorithm.final else None,
    )

"""The protocol: an algorithm is a frozen value of pure functions.

An algorithm holds no counter, no random state and no client data. It is cut at the wire: no
function sees both the server's state and a client's data. The style is that of optax and fedjax.

The client's side is one generator over what the client has. It yields :class:`Train` and
:class:`Score`, is sent the results, and returns :class:`Sent`. FedAvg of both LoRA factors:

>>> import torch
>>> from fedvlm import Algorithm, Averaged, Sent, Train, simulate
>>> def work(local):
...     trained = yield Train(local.begin)
...     return Sent(trained.end)
>>> fedavg = Algorithm(
...     init=lambda initial: initial,
...     send=lambda state, visit: state,
...     model=lambda initial, down, mine: {**initial, **down, **mine},
...     work=work,
...     server=Averaged(lambda state, mean, round: mean),
... )

:func:`fedvlm.simulate` runs it in milliseconds, on clients whose loss is a formula. Two clients
pull one factor to 0 and to 3; the second has twice as many examples:

>>> factor = "layer.lora_A.weight"
>>> clients = {"a": (1.0, lambda name, now: now - 0.0), "b": (2.0, lambda name, now: now - 3.0)}
>>> run = simulate(fedavg, clients, {factor: torch.ones(1, 1)}, rounds=50, steps=2)
>>> round(run.model()[factor].item(), 3)
2.0
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fedvlm.errors import FedVLMError
from fedvlm.tree import Select, Tree

if TYPE_CHECKING:
    from torch import Tensor

State = Tree
"""The state of the server between rounds: named tensors, so that a checkpoint is one file."""


@dataclass(frozen=True)
class Visit:
    """One client in one round; both ends of the wire know these facts.

    Attributes:
        client: the client's name; empty for the global model, which belongs to no client.
        weight: the number of the client's training examples.
        sampled: the cohort's share of all clients' examples, in (0, 1].
        round: from 1; 0 before the first round.
        final: whether this is the extra round with all clients, see :class:`Algorithm`.
    """

    client: str
    weight: float
    sampled: float = 1.0
    round: int = 0
    final: bool = False


NOBODY = Visit("", 1.0)


@dataclass(frozen=True)
class Local:
    """Everything that a client has when a round begins.

    Attributes:
        visit: the client and the round.
        begin: the client's model, ``model(initial, down, mine)``: a whole adapter.
        down: the download from the server.
        mine: the tensors that the client kept in its last round; empty at first.
        steps: the usual number of optimizer steps of this round at this client; in the final round
            ``train.finish_steps``.
    """

    visit: Visit
    begin: Tree
    down: Tree
    mine: Tree
    steps: int


def everything(name: str) -> bool:
    """Selects every factor."""
    return True


@dataclass(frozen=True)
class Term:
    """An extra gradient, ``constant + rate * factor``, on the factors that ``constant`` names."""

    constant: Tree
    rate: float = 0.0


@dataclass(frozen=True)
class Train:
    """Asks for a stretch of local training; the answer is a :class:`Trained`.

    Attributes:
        begin: the whole adapter at the start of training.
        trains: selects the factors to train; the others stay constant.
        steps: optimizer steps, 0 or more; None: the usual number of a round.
        terms: extra gradients, added before clipping.
        mask: ``(name, factor) -> mask``, true for the elements of a trained factor that are
            trained. It broadcasts to ``[rank, in]`` or ``[out, rank]``. None: all elements.
        resume: whether to continue with the optimizer of this client's previous stretch, which
            trained the same factors. Otherwise the optimizer is fresh.
    """

    begin: Tree
    trains: Select = everything
    steps: int | None = None
    terms: tuple[Term, ...] = ()
    mask: Callable[[str, Tensor], Tensor] | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if not callable(self.trains):
            raise TypeError(
                f"Train.trains is a function of a factor's name, got {self.trains!r:.80}; see "
                "fedvlm.tree.factor"
            )
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"a stretch has 0 steps or more, got {self.steps}")


class Trained(NamedTuple):
    """The result of a stretch of training.

    Attributes:
        end: the whole adapter.
        path: the sum of the learning rates of all steps, by factor (``A``, ``B``).
    """

    end: Tree
    path: Mapping[str, float]


@dataclass(frozen=True)
class Score:
    """Asks for the scores of adapters on the client's validation rows, at most 64 of them.

    The answer is a :class:`Validation` for each adapter, or ``()`` for a client without validation
    rows.
    """

    trees: Sequence[Tree]


class Validation(NamedTuple):
    """The scores of an adapter on a client's validation rows; lower is better.

    Attributes:
        loss: mean loss, in nats a token (SFT) or DPO's loss a pair.
        doubt: mean probability that the model does not give to the right answer token (SFT) or to
            the preferred answer of a pair (DPO), 0 to 1. Unlike the loss, it is bounded.
    """

    loss: float
    doubt: float


@dataclass(frozen=True)
class Sent:
    """The end of a client's round.

    Attributes:
        up: the upload; empty: nothing leaves the client.
        keep: the tensors that the client keeps for its next round. They never leave the client.
    """

    up: Tree
    keep: Tree = field(default_factory=dict)

    def __post_init__(self) -> None:
        for field_, tree in (("up", self.up), ("keep", self.keep)):
            if not isinstance(tree, dict):
                raise TypeError(
                    f"Sent.{field_} is a dict of names and tensors, got {type(tree).__name__}"
                )
            odd = [name for name, tensor in tree.items() if not hasattr(tensor, "dtype")]
            if odd:
                raise TypeError(
                    f"Sent.{field_}['{odd[0]}'] is a tensor, got {type(tree[odd[0]]).__name__}"
                )


@dataclass(frozen=True)
class Upload:
    """An upload at the server, with the visit that it belongs to."""

    visit: Visit
    tree: Tree


Ask = Train | Score
Program = Generator[Ask, Any, Sent]
"""A running round of a client. It receives a :class:`Trained` for each :class:`Train`, and a tuple
of :class:`Validation` for each :class:`Score`."""


class Init(Protocol):
    """Server, once: the state from the common initial adapter.

    ``init``, ``send``, ``model`` and ``work`` also run on tensors without values, for the plan of a
    run and the form of its messages (:mod:`fedvlm.algorithms.dry`): no ``.item()`` of a factor.
    """

    def __call__(self, initial: Tree) -> State: ...


class Send(Protocol):
    """Server: the download for the client of a visit."""

    def __call__(self, state: State, visit: Visit) -> Tree: ...


class Model(Protocol):
    """Client: the client's whole adapter, from the initial adapter, the download and kept state."""

    def __call__(self, initial: Tree, down: Tree, mine: Tree) -> Tree: ...


class Work(Protocol):
    """Client: a round, as a generator.

    It also runs on tensors without values (:mod:`fedvlm.algorithms.dry`), with empty ``mine`` and
    no validation rows. The names and shapes of its upload may depend on the round and on ``down``,
    but not on values or on the client's name.
    """

    def __call__(self, local: Local) -> Program: ...


class Update(Protocol):
    """Server: the changed tensors of the state, from the weighted mean of the lifted uploads."""

    def __call__(self, state: State, mean: Tree, round: int) -> Tree: ...


class Lift(Protocol):
    """Server: the summand of an upload in the mean, such as a product B A, and its weight."""

    def __call__(self, upload: Tree, visit: Visit) -> tuple[Tree, float]: ...


class Gather(Protocol):
    """Server: the changed tensors of the state, from all uploads of a round at once."""

    def __call__(self, state: State, uploads: Sequence[Upload], round: int) -> Tree: ...


def by_examples(upload: Tree, visit: Visit) -> tuple[Tree, float]:
    """The whole upload, weighted by the client's number of training examples."""
    return upload, visit.weight


@dataclass(frozen=True)
class Averaged:
    """A server that uses the weighted mean of the uploads; uploads are folded in one by one."""

    update: Update
    lift: Lift = by_examples


@dataclass(frozen=True)
class Gathered:
    """A server that needs every upload of a round at once; its memory grows with the cohort."""

    update: Gather


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm over LoRA factors; see the protocols for each function.

    Attributes:
        init: server, ``(initial) -> state``.
        send: server, ``(state, visit) -> down``.
        model: client, ``(initial, down, mine) -> adapter``: the client's model, which is scored,
            exported, and the usual start of training.
        work: client, ``(local) -> generator`` of :class:`Train` and :class:`Score`, which returns
            :class:`Sent`.
        server: how uploads become the next state: :class:`Averaged` or :class:`Gathered`.
        final: whether an extra round with all clients follows the last round. The ending of a run
            adds it (:mod:`fedvlm.algorithms.ending`); an algorithm with ``final`` has its own.
    """

    init: Init
    send: Send
    model: Model
    work: Work
    server: Averaged | Gathered
    final: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.server, Averaged | Gathered):
            raise TypeError(
                "an algorithm's server is Averaged(update) or Gathered(update), got "
                f"{self.server!r:.80}"
            )


def step(program: Program, answer: Trained | tuple[Validation, ...] | None = None) -> Ask | Sent:
    """Sends an answer to a program; returns its next request or its result.

    Raises:
        TypeError: the program yields or returns anything else.
    """
    if not isinstance(program, Generator):
        raise TypeError(
            f"an algorithm's work must be a generator function, one with yield; got {program!r:.80}"
        )
    try:
        found: object = program.send(answer)
    except StopIteration as end:
        found = end.value
        if not isinstance(found, Sent):
            wrong = f"an algorithm's work must return Sent(...), got {found!r:.80}"
            raise TypeError(wrong) from None
        return found
    if not isinstance(found, Train | Score):
        raise TypeError(f"an algorithm's work must yield Train or Score, got {found!r:.80}")
    return found


def changed(program: Program, change: Callable[[Ask], Ask]) -> Program:
    """``program`` with ``change`` applied to each of its requests."""
    ask = step(program)
    while not isinstance(ask, Sent):
        ask = step(program, (yield change(ask)))
    return ask


def expected(algorithm: object) -> Algorithm:
    """The algorithm, which somebody handed over as an object.

    Raises:
        FedVLMError: it is anything else.
    """
    if not isinstance(algorithm, Algorithm):
        raise FedVLMError(
            f"algorithm must be a fedvlm.Algorithm, got {algorithm!r:.80}; set algorithm.name to "
            "choose one by name"
        )
    return algorithm

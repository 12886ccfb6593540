"""Rounds with secure aggregation: which runs can have it, and the mean that the server gets."""

from __future__ import annotations

from collections.abc import Mapping

from fedvlm.algorithms.base import Algorithm, Gathered, State, Visit
from fedvlm.algorithms.table import find
from fedvlm.engines.base import Engine
from fedvlm.engines.blinded import Blinded
from fedvlm.engines.summand import Summand, Summed
from fedvlm.engines.wire import Reply
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.privacy.blind.messages import LEAST, MOST
from fedvlm.rounds.fold import check_changes
from fedvlm.settings.sections import Config
from fedvlm.tree import digest

VOIDS = 3
"""Void rounds in a row after which a run ends; it can be resumed."""

OFF = "or set wire.secure=false"


def check(config: Config, algorithm: Algorithm, clients: int | None = None) -> None:
    """Refuses a run that secure aggregation cannot serve.

    Args:
        config: the settings of the run.
        algorithm: its algorithm.
        clients: the number of its clients; None: not known yet.

    Raises:
        ConfigError: the server needs single uploads, clients get different downloads, or a round
            has too few or too many clients.
    """
    if not config.wire.secure:
        return
    name, wrong = config.algorithm.name, []
    if find(name).pools:
        wrong.append(f"algorithm.name={name} sends no uploads: set wire.secure=false")
    if isinstance(algorithm.server, Gathered):
        wrong.append(
            f"wire.secure shows the server a sum only, but the server of algorithm.name={name} "
            f"needs every upload: choose another algorithm, such as plora, {OFF}"
        )
    if config.lora.ranks:
        wrong.append(
            "wire.secure needs one download for all clients, and lora.ranks gives them different "
            f"ones: leave lora.ranks out, {OFF}"
        )
    if config.privacy.unit == "client":
        wrong.append(
            "privacy.unit=client clips single uploads at the server, and wire.secure shows the "
            f"server their sum only: set privacy.unit=row, {OFF}"
        )
    size = None if clients is None else min(config.train.clients_per_round or clients, clients)
    if size is not None and not LEAST <= size <= MOST:
        wrong.append(
            f"wire.secure needs {LEAST} to {MOST} clients in a round, but there are {size}: change "
            f"train.clients_per_round or the number of clients, {OFF}"
        )
    if wrong:
        raise ConfigError(wrong)


def secured(engine: Engine, config: Config, weights: Mapping[str, float], state: State) -> Engine:
    """The engine with secure aggregation, if the run has it and the engine has none of its own.

    Args:
        engine: trains and scores the clients.
        config: the settings of the run.
        weights: client -> its weight.
        state: the server's state, from which the downloads are made.

    Raises:
        ConfigError: the algorithm sends different downloads to the clients, or weighs an upload
            by its values.
    """
    if not config.wire.secure:
        return engine
    visits = (Visit(client, weight, round=1) for client, weight in weights.items())
    if len({digest(engine.algorithm.send(state, visit)) for visit in visits}) > 1:
        raise ConfigError(
            [
                "wire.secure needs one download for all clients, and algorithm.name="
                f"{config.algorithm.name} sends different ones: choose another algorithm, {OFF}"
            ]
        )
    visit = Visit(next(iter(weights)), 1.0, round=1)
    Summand(engine.algorithm, engine.adapter, visit, engine.algorithm.send(state, visit))
    return engine if engine.secure else Blinded(engine, config)


class SumFold:
    """Takes the outcome of a secure sum in place of a fold of single uploads.

    Attributes:
        losses: empty, because the loss of a client is not known.
        rejected: empty, because no single upload is checked.
        bounded: empty, because no single upload is compared.
        answered: the clients that have sent a masked upload.
        bytes_up: client -> bytes of its messages.
        steps: client -> optimizer steps, of the clients whose engine counts them.
        passes: client -> forward passes in rows, of the same clients.
        told: the line of metrics about the sum.
    """

    def __init__(self, engine: Engine) -> None:
        self.server = engine.algorithm.server
        self.losses: dict[str, float] = {}
        self.rejected: dict[str, str] = {}
        self.bounded: dict[str, dict[str, float]] = {}
        self.answered: set[str] = set()
        self.bytes_up: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        self.passes: dict[str, int] = {}
        self._summed = Summed(void="no client has answered")

    def add(self, reply: Reply | Summed) -> bool:
        """Notes that a client has trained, or takes the sum; returns whether it was a client."""
        if isinstance(reply, Summed):
            self._summed, self.bytes_up = reply, reply.bytes_up
            return False
        self.answered.add(reply.client)
        if reply.passes or reply.steps:
            self.steps[reply.client], self.passes[reply.client] = reply.steps, reply.passes
        return True

    @property
    def told(self) -> dict[str, object]:
        """The part of the round's line of metrics about the sum."""
        if self._summed.void:
            return {"secure": {"void": self._summed.void}}
        return {"secure": {"clients": list(self._summed.clients), "loss": self._summed.loss}}

    def update(self, state: State, round_: int) -> State:
        """The state after the round; the state before a void round."""
        if not self._summed.tree:
            return state
        assert not isinstance(self.server, Gathered), "checked before round 1"
        changes = self.server.update(state, self._summed.tree, round_)
        check_changes(changes, state)
        return {**state, **changes}


class Voids:
    """Counts void rounds in a row."""

    def __init__(self) -> None:
        self._count = 0

    def after(self, line: Mapping[str, object]) -> None:
        """Takes the line of a committed round.

        Raises:
            FedVLMError: this is the third void round in a row.
        """
        told = line.get("secure")
        why = told.get("void") if isinstance(told, dict) else None
        self._count = self._count + 1 if why else 0
        if self._count >= VOIDS:
            raise FedVLMError(
                f"{VOIDS} rounds in a row had no secure sum; the last reason: {why}. The run can "
                "be resumed when enough sites are back"
            )

"""What passes between server and clients is checked before it counts, at the end that receives it.

What an algorithm sends follows from the algorithm alone: its own functions are given an adapter
that has shapes and no values (:class:`Forms`), so that a round of RoLoRA, a client of a lower rank
and a compressed upload are each checked against what they have to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedvlm.algorithms.table import Algorithm, Client, State, Work
from fedvlm.errors import FedVLMError
from fedvlm.tree import Tree, change

if TYPE_CHECKING:
    from fedvlm.engines.wire import Reply


def sent_up(algorithm: Algorithm, adapter: Tree, down: Tree) -> Tree:
    """A message of a client that was sent ``down``; its values mean nothing, its form does.

    Args:
        algorithm: of the round.
        adapter: the common initial adapter, or one without values.
        down: the same.
    """
    begun = algorithm.start(adapter, down, {})
    phases = len(algorithm.phases)
    work = Work(down, {}, (begun,) * phases, ({"A": 1.0, "B": 1.0},) * phases, begun)
    return algorithm.finish(work)[0]


class Forms:
    """Tells what a message has to be, and refuses what is not.

    Args:
        adapter: the common initial adapter; its shapes alone are used.
        max_norm: the largest norm of what an upload changes of what its client was sent (of the
            upload itself, where it was sent no such tensors); None: any.
    """

    def __init__(self, adapter: Tree, max_norm: float | None = None):
        self.max_norm = max_norm
        self._adapter = _bare(adapter)
        self._states: dict[Algorithm, State] = {}
        self._up: dict[tuple[Any, ...], Tree] = {}

    def check_download(self, algorithm: Algorithm, client: str, down: Tree) -> None:
        """Refuses what the algorithm's server would not send.

        Raises:
            FedVLMError: names, shapes or types differ, or a value is not finite.
        """
        if algorithm not in self._states:
            self._states[algorithm] = algorithm.init(self._adapter)
        form = algorithm.download(self._states[algorithm], Client(client, 1.0))
        wrong = _unlike(down, form) or _infinite(down)
        if wrong:
            raise FedVLMError(f"client '{client}' refuses what the server sent: it {wrong}")

    def received(
        self, algorithm: Algorithm, client: Client, down: Tree, message: Tree, weight: float
    ) -> Tree:
        """The upload that a client's message holds.

        Args:
            algorithm: of the round.
            client: as it registered; its weight is the most that it may claim.
            down: what it was sent.
            message: what came.
            weight: the examples that it says it has trained on.

        Raises:
            FedVLMError: the message is not what the algorithm lets this client send, holds a value
                that is not finite, changes too much, or claims too many examples.
        """
        wrong = _unlike(message, self._upload(algorithm, down)) or _miscounted(client, weight)
        upload: Tree = {}
        if not wrong:
            try:
                upload = algorithm.decode(message, down)
            except ValueError as error:
                wrong = str(error)
        wrong = wrong or _infinite(upload) or self._too_far(down, upload)
        if wrong:
            raise FedVLMError(f"the upload of client '{client.name}' {wrong}")
        return upload

    def _upload(self, algorithm: Algorithm, down: Tree) -> Tree:
        told = (tuple(t.flatten().tolist()) for t in down.values() if not t.is_floating_point())
        key = algorithm, *told, *((n, t.shape, t.dtype) for n, t in down.items())
        if key not in self._up:
            self._up[key] = sent_up(algorithm, self._adapter, _bare(down))
        return self._up[key]

    def _too_far(self, down: Tree, upload: Tree) -> str:
        if self.max_norm is None or not upload:
            return ""
        norm = _norm(change(down, upload))
        if norm <= self.max_norm:
            return ""
        most = f"wire.max_norm={self.max_norm:g}"
        return f"changes what its client was sent by a norm of {norm:.4g}, above {most}"


def _bare(tree: Tree) -> Tree:
    """The tensors without values, but for whole numbers, which say what follows."""
    return {n: t.to("meta") if t.is_floating_point() else t for n, t in tree.items()}


def _unlike(tree: Tree, form: Tree) -> str:
    """How a message differs from what it has to be; empty if it does not."""
    if missing := sorted(form.keys() - tree.keys()):
        return f"lacks {_named(missing)} of {len(form)} tensors"
    if extra := sorted(tree.keys() - form.keys()):
        return f"holds {_named(extra)} that the algorithm does not send"
    for name, tensor in tree.items():
        like = form[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            return f"has '{name}' as {_described(tensor)}, which must be {_described(like)}"
    return ""


def _named(names: Sequence[str]) -> str:
    return f"'{names[0]:.200}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _described(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _miscounted(client: Client, weight: float) -> str:
    if 0 < weight <= client.weight:
        return ""
    return f"claims {weight:g} training examples, and it registered {client.weight:g}"


def _infinite(tree: Tree) -> str:
    if math.isfinite(_norm(tree)):
        return ""
    name = next((n for n, t in tree.items() if not t.isfinite().all()), "")
    return f"has values in '{name}' that are not finite" if name else "is too large for its norm"


def _norm(tree: Tree) -> float:
    """Of all the tree's numbers together."""
    import torch

    real = [t for t in tree.values() if t.is_floating_point()]
    return float(torch.stack(torch._foreach_norm(real)).double().norm()) if real else 0.0


@dataclass(frozen=True)
class Task:
    """One client's work in one round.

    Attributes:
        client: its name.
        round: the round, from 1.
        down: what the server sent.
        rated: whether its model at the end of the round's training is scored next.
    """

    client: str
    round: int
    down: Tree
    rated: bool = False


@dataclass(frozen=True)
class Reply:
    """What a client did.

    Attributes:
        client: its name.
        upload: what leaves it.
        weight: the number of its training examples.
        loss: mean training loss over the round's steps: nats a token (SFT), the DPO loss a pair.
    """

    client: str
    upload: Tree
    weight: float
    loss: float

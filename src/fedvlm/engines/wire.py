"""What passes between server and clients is checked before it counts, at the end that receives it.

What an algorithm sends follows from the algorithm alone: its own functions are given an adapter
that has shapes and no values (:class:`Forms`), so that a round of RoLoRA, a client of a lower rank
and a compressed upload are each checked against what they have to be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedvlm.algorithms.table import Algorithm, Client, State, Upload, Work
from fedvlm.errors import FedVLMError
from fedvlm.tree import Mean, Tree, change, saved_bytes

if TYPE_CHECKING:
    from fedvlm.engines.base import Reply


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


class Fold:
    """A round's uploads at the server: checked and folded one by one, a bad one left out by name.

    Args:
        algorithm: of the round.
        known: the cohort, as registered.
        downs: what each was sent.
        forms: the checks.

    Attributes:
        losses: client -> its training loss, of those whose upload counts.
        rejected: client -> why its upload does not.
        bytes_up: client -> bytes of its message.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        known: Mapping[str, Client],
        downs: Mapping[str, Tree],
        forms: Forms,
    ):
        self.algorithm, self.known, self.downs, self.forms = algorithm, known, downs, forms
        self.losses: dict[str, float] = {}
        self.rejected: dict[str, str] = {}
        self.bytes_up: dict[str, int] = {}
        self._mean, self._uploads = Mean(), list[Upload]()

    def add(self, reply: Reply) -> bool:
        """Takes a client's reply; whether its upload counts."""
        client, one = self.known[reply.client], self.algorithm
        down, message = self.downs[client.name], reply.upload
        self.bytes_up[client.name] = saved_bytes(message)
        try:
            upload = self.forms.received(one, client, down, message, reply.weight)
        except FedVLMError as error:
            self.rejected[client.name] = str(error)
            return False
        if not math.isfinite(reply.loss):
            self.rejected[client.name] = f"the loss of client '{client.name}' is {reply.loss}"
            return False
        if upload and one.gather:
            self._uploads.append(Upload(client, upload))
        elif upload:
            self._mean.add(one.lift(upload, client), reply.weight)
        self.losses[client.name] = reply.loss
        return True

    def update(self, state: State) -> State:
        """The state after the round.

        Raises:
            FedVLMError: every upload was rejected.
        """
        if self.rejected and not self.losses:
            told = "\n".join(f"  - {why}" for why in self.rejected.values())
            raise FedVLMError(
                f"none of the {len(self.rejected)} uploads of this round can be used:\n{told}"
            )
        if self.algorithm.gather and self._uploads:
            return self.algorithm.gather(state, self._uploads)
        if self._mean.total:
            return self.algorithm.update(state, self._mean.tree())
        return state


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

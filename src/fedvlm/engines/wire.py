"""Messages between server and clients, and the checks of the receiver.

The form of a message follows from the algorithm alone: its functions run on an adapter that has
shapes and no values (:mod:`fedvlm.algorithms.dry`). So the checks know the exact form of a message
in any round of RoLoRA, from a client of a lower rank, or after compression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedvlm.algorithms.base import Algorithm, State, Visit
from fedvlm.algorithms.dry import bare, rehearse
from fedvlm.engines.portable import portable
from fedvlm.engines.stages import Stage, opened, packed
from fedvlm.errors import FedVLMError
from fedvlm.tree import Tree, change

portable(Visit)


@portable
@dataclass(frozen=True)
class Task:
    """One client's work in one round.

    Attributes:
        visit: the client and the round.
        down: the download from the server.
        rated: whether the client's model at the end of the round's training will be scored.
    """

    visit: Visit
    down: Tree
    rated: bool = False

    @property
    def client(self) -> str:
        """The client's name."""
        return self.visit.client

    @property
    def round(self) -> int:
        """The round, from 1."""
        return self.visit.round


@portable
@dataclass(frozen=True)
class Reply:
    """The result of a client's round.

    Attributes:
        client: the client's name.
        upload: the upload, after the wire's stages.
        weight: the number of the client's training examples.
        loss: mean training loss over the round's steps: nats a token (SFT), the DPO loss a pair; 0
            where the round had no step. None: not told, as under differential privacy at a site.
        steps: optimizer steps of the round; 0 where unknown, as at deployed sites.
        passes: forward passes of the round, in rows: those of training, and those of validation
            for each validated adapter; 0 where unknown.
    """

    client: str
    upload: Tree
    weight: float
    loss: float | None
    steps: int = 0
    passes: int = 0


def sent_up(
    algorithm: Algorithm, adapter: Tree, visit: Visit, down: Tree, stages: Sequence[Stage] = ()
) -> Tree:
    """The form of a client's message, as tensors whose values mean nothing.

    Args:
        algorithm: the algorithm of the run.
        adapter: the common initial adapter, or one without values.
        visit: the client and the round.
        down: the client's download.
        stages: the stages of the wire.
    """
    up = rehearse(algorithm, adapter, visit, down, steps=1).sent.up
    return packed(stages, up, down, {}, visit)[0]


class Forms:
    """Knows the form of each message, and refuses a message of another form.

    Args:
        algorithm: the algorithm of the run.
        adapter: the common initial adapter; only its shapes are used.
        stages: the stages of the wire.
        max_norm: the largest norm of an upload minus the download; tensors that the download lacks
            count whole. None: no limit.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        adapter: Tree,
        stages: Sequence[Stage] = (),
        max_norm: float | None = None,
    ):
        self.algorithm, self.stages, self.max_norm = algorithm, stages, max_norm
        self._adapter = bare(adapter)
        self._state: State | None = None
        self._up: dict[tuple[Any, ...], Tree] = {}

    def check_download(self, visit: Visit, down: Tree, client: str = "") -> None:
        """Refuses a download that the algorithm's server would not send.

        Args:
            visit: the receiver's visit; :data:`NOBODY` for the global model.
            down: the download as received.
            client: the name of the receiver, for the error; empty: the visit's client.

        Raises:
            FedVLMError: names, shapes or types differ, or a value is not finite.
        """
        if self._state is None:
            self._state = self.algorithm.init(self._adapter)
        form = self.algorithm.send(self._state, visit)
        wrong = _unlike(down, form) or _infinite(down)
        if wrong:
            name = client or visit.client
            raise FedVLMError(f"client '{name}' refuses the server's message: it {wrong}")

    def received(self, visit: Visit, down: Tree, message: Tree, weight: float) -> Tree:
        """The upload in a client's message.

        Args:
            visit: the client as registered; its weight limits the number of claimed examples.
            down: the client's download.
            message: the message as received.
            weight: the claimed number of training examples.

        Raises:
            FedVLMError: the message has another form than the algorithm's, holds a value that is
                not finite, changes too much, or claims too many examples.
        """
        wrong = _unlike(message, self._upload(visit, down)) or _miscounted(visit, weight)
        upload: Tree = {}
        if not wrong:
            try:
                upload = opened(self.stages, message, down)
            except ValueError as error:
                wrong = str(error)
        wrong = wrong or _infinite(upload) or self._too_far(down, upload)
        if wrong:
            raise FedVLMError(f"the upload of client '{visit.client}' {wrong}")
        return upload

    def _upload(self, visit: Visit, down: Tree) -> Tree:
        told = (tuple(t.flatten().tolist()) for t in down.values() if not t.is_floating_point())
        form = ((n, t.shape, t.dtype) for n, t in down.items())
        key = replace(visit, client="", weight=1.0), *told, *form
        if key not in self._up:
            args = self.algorithm, self._adapter, visit, bare(down), self.stages
            self._up = {k: v for k, v in self._up.items() if k[0].round == visit.round}
            self._up[key] = sent_up(*args)
        return self._up[key]

    def _too_far(self, down: Tree, upload: Tree) -> str:
        if self.max_norm is None or not upload:
            return ""
        found = norm(change(down, upload))
        if found <= self.max_norm:
            return ""
        most = f"wire.max_norm={self.max_norm:g}"
        return f"differs from the download by a norm of {found:.4g}, above {most}"


def _unlike(tree: Tree, form: Tree) -> str:
    """The first difference between a message and its form, as a phrase; empty where they agree."""
    if missing := sorted(form.keys() - tree.keys()):
        return f"lacks {_named(missing)} of {len(form)} tensors"
    if extra := sorted(tree.keys() - form.keys()):
        return f"holds {_named(extra)} that the algorithm does not send"
    for name, tensor in tree.items():
        like = form[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            return f"has '{name}' as {_described(tensor)} instead of {_described(like)}"
    return ""


def _named(names: Sequence[str]) -> str:
    return f"'{names[0]:.200}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _described(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _miscounted(visit: Visit, weight: float) -> str:
    if 0 < weight <= visit.weight:
        return ""
    return f"claims {weight:g} training examples, but the client registered {visit.weight:g}"


def _infinite(tree: Tree) -> str:
    if math.isfinite(norm(tree)):
        return ""
    name = next((n for n, t in tree.items() if not t.isfinite().all()), "")
    return f"has values in '{name}' that are not finite" if name else "is too large for its norm"


def norm(tree: Tree) -> float:
    """The norm of all real numbers of the tree together."""
    import torch

    real = [t for t in tree.values() if t.is_floating_point()]
    return float(torch.stack(torch._foreach_norm(real)).double().norm()) if real else 0.0

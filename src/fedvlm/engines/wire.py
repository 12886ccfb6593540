"""Messages between server and clients, and the checks of the receiver.

The form of a message follows from the algorithm alone: its functions run on an adapter that has
shapes and no values (:mod:`fedvlm.algorithms.dry`). So the checks know the exact form of a message
in any round of RoLoRA, from a client of a lower rank, or after compression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedvlm.algorithms.base import Algorithm, State, Visit
from fedvlm.algorithms.dry import bare, rehearse
from fedvlm.engines.portable import portable
from fedvlm.engines.stages import Stage, opened, packed
from fedvlm.errors import FedVLMError
from fedvlm.tree import Described, Tree, described, grouped, joined, split

if TYPE_CHECKING:
    from torch import Tensor

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
        self._up: dict[tuple[Any, ...], Form] = {}
        self._last: tuple[Visit, Tree, Form] | None = None  # of the last upload
        self._checked: tuple[Tree, Tree] | None = None  # the last good download, and its form
        self._origin = Origin({})

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
        if self._checked and self._checked[0] is down and self._checked[1] is form:
            return  # most algorithms send the same object to all clients of a round
        wrong = Form(form).unlike(down) or _infinite(down)
        if wrong:
            name = client or visit.client
            raise FedVLMError(f"client '{name}' refuses the server's message: it {wrong}")
        self._checked = down, form

    def received(self, visit: Visit, down: Tree, message: Tree, weight: float) -> Tree:
        """The upload in a client's message, see :meth:`measured`."""
        return self.measured(visit, down, message, weight)[0]

    def measured(
        self, visit: Visit, down: Tree, message: Tree, weight: float
    ) -> tuple[Tree, float]:
        """The upload in a client's message, and the norm of its change of the download.

        Tensors that the download lacks count whole.

        Args:
            visit: the client as registered; its weight limits the number of claimed examples.
            down: the client's download.
            message: the message as received.
            weight: the claimed number of training examples.

        Raises:
            FedVLMError: the message has another form than the algorithm's, holds a value that is
                not finite, changes too much, or claims too many examples.
        """
        wrong = self._upload(visit, down).unlike(message) or _miscounted(visit, weight)
        upload, moved = dict[str, "Tensor"](), 0.0
        if not wrong:
            try:
                upload = opened(self.stages, message, down)
            except ValueError as error:
                wrong = str(error)
        if not wrong:
            self._origin = self._origin.of(down)
            moved = self._origin.distance(upload)  # finite only where every value is
            wrong = ("" if math.isfinite(moved) else _infinite(upload)) or self._too_far(moved)
        if wrong:
            raise FedVLMError(f"the upload of client '{visit.client}' {wrong}")
        return upload, moved

    def _upload(self, visit: Visit, down: Tree) -> Form:
        anyone = replace(visit, client="", weight=1.0)
        if self._last and self._last[1] is down and self._last[0] == anyone:
            return self._last[2]
        told = (tuple(t.flatten().tolist()) for t in down.values() if not t.is_floating_point())
        key = anyone, *told, *described(down)
        if key not in self._up:
            args = self.algorithm, self._adapter, visit, bare(down), self.stages
            self._up = {k: v for k, v in self._up.items() if k[0].round == visit.round}
            self._up[key] = Form(sent_up(*args))
        self._last = anyone, down, self._up[key]
        return self._up[key]

    def _too_far(self, moved: float) -> str:
        if self.max_norm is None or moved <= self.max_norm:
            return ""
        most = f"wire.max_norm={self.max_norm:g}"
        return f"differs from the download by a norm of {moved:.4g}, above {most}"


class Form:
    """The form of a message.

    Args:
        tree: a message of this form; its values mean nothing.
    """

    def __init__(self, tree: Tree):
        self._tree, self._described = tree, described(tree)

    def unlike(self, tree: Tree) -> str:
        """The first difference of a message, as a phrase; empty for a message of this form."""
        if described(tree) == self._described:
            return ""
        form = self._tree
        if missing := sorted(form.keys() - tree.keys()):
            return f"lacks {_named(missing)} of {len(form)} tensors"
        if extra := sorted(tree.keys() - form.keys()):
            return f"holds {_named(extra)} that the algorithm does not send"
        for name, tensor in tree.items():
            like = form[name]
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                return f"has '{name}' as {_shown(tensor)} instead of {_shown(like)}"
        return ""  # in another order


def _named(names: Sequence[str]) -> str:
    return f"'{names[0]:.200}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _shown(tensor: Any) -> str:
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
    groups = grouped({n: t for n, t in tree.items() if t.is_floating_point()})
    return _norm([joined([tree[name] for name in names]) for names in groups])


def _norm(real: list[Tensor]) -> float:
    import torch

    return math.hypot(*(one.item() for one in torch._foreach_norm(real))) if real else 0.0


class Origin:
    """A download, from which the changes of uploads are measured.

    Args:
        down: the download.
    """

    def __init__(self, down: Tree):
        self.down = down
        self._places: dict[Described, list[tuple[list[str], Tensor | None]]] = {}

    def of(self, down: Tree) -> Origin:
        """The origin of a download: this one, if it is the same object, as in most algorithms."""
        return self if self.down is down else Origin(down)

    def distance(self, up: Tree) -> float:
        """The norm of :func:`fedvlm.tree.change`: tensors that the download lacks count whole."""
        form = described(up)
        if form not in self._places:
            self._places[form] = self._placed(up)
        found = []
        for names, begin in self._places[form]:
            vector = joined([up[name] for name in names])
            found.append(vector if begin is None else vector - begin)
        return _norm(found)

    def _placed(self, up: Tree) -> list[tuple[list[str], Tensor | None]]:
        """The names of each vector of an upload, and the vector of the download."""
        real = {n: t for n, t in up.items() if t.is_floating_point()}
        known, new = split(real, lambda n: n in self.down and self.down[n].shape == real[n].shape)
        begins = [(names, joined([self.down[n] for n in names])) for names in grouped(known)]
        return [*begins, *((names, None) for names in grouped(new))]

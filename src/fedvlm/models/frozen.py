"""Results of the frozen model alone: computed once, then cached.

The untuned model's answers depend on no adapter, so compared runs share them (:func:`answers`).

If only the language model has LoRA, the features that the vision tower and the projector compute
for a picture never change. The models' forward pass and generation call ``get_image_features``.
That method is replaced by one that returns cached features: from memory up to a budget, then from
disk. Each picture's features are computed alone, not in a batch. They are therefore the same
whichever batch needs them first, after a resume, and across several runs (:func:`handed_on`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedvlm.models.spool import Spool, each, nbytes
from fedvlm.models.stack import StackedLora
from fedvlm.tree import digest

FIELDS = ("pooler_output", "deepstack_features")  # the fields that the models' forward reads


@dataclass
class Handed:
    """Features that a run leaves to the next run, by picture, and the model that made them.

    The untuned model's answers to some rows lie beside them, by everything that they depend on.
    """

    model: str = ""
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)


_handed: ContextVar[Handed | None] = ContextVar("handed", default=None)


def hand_on() -> Token[Handed | None]:
    """From now on, each run leaves to the next run what depends on no adapter."""
    return _handed.set(Handed())


@contextlib.contextmanager
def handed_on() -> Iterator[None]:
    """Within this context, each run leaves to the next run what depends on no adapter."""
    token = hand_on()
    try:
        yield
    finally:
        _handed.reset(token)


def answers() -> dict[str, Any]:
    """The untuned model's answers that runs hand on; an empty dict where they hand on nothing."""
    handed = _handed.get()
    return {} if handed is None else handed.answers


class ImageFeatures:
    """The image features of a data set's rows.

    Args:
        model: the model, with stacked LoRA layers.
        inputs: a row's inputs other than the text ``{name: [1 or patches, ...]}``, on the device.
        budget: bytes of memory for features, including those that an earlier run left.
        spool: holds the features beyond that budget. Features that do not fit there either are
            recomputed each time.
        source: identity of the frozen model. Features of another model are not reused.
    """

    def __init__(
        self,
        model: Any,
        inputs: Callable[[int], dict[str, Tensor]],
        budget: int,
        spool: Spool | None = None,
        source: str = "",
    ):
        self._owner = image_side(model)
        self._inputs = inputs
        self._spool = spool
        self._kept: dict[str, dict[str, Any]] = {}
        self._places: dict[str, Any] = {}  # picture -> its features' places on disk
        self._pictures: dict[int, str] = {}  # row -> picture, for the rows seen so far
        self._earlier = _taken_over(source, self._kept)
        self._room = budget - nbytes(self._earlier)
        self._rows: list[int] = []
        if self._owner is not None:
            self._compute = self._owner.get_image_features
            names = inspect.signature(self._compute).parameters
            self._takes = [n for n in names if n not in ("self", "kwargs")]
            # Generation inspects the names of the parameters.
            self._replacement = functools.wraps(self._compute)(
                lambda *args, **kwargs: self._hand_out()
            )

    def usable(self, row: int) -> bool:
        """Whether the features can be cached: no LoRA layer takes part in computing them."""
        if self._owner is None:
            return False
        touched: list[StackedLora] = []
        layers = [m for m in self._owner.modules() if isinstance(m, StackedLora)]
        hooks = [m.register_forward_hook(lambda m, *_: touched.append(m)) for m in layers]
        try:
            found = self._look(self._inputs(row))
        finally:
            for hook in hooks:
                hook.remove()
        return not touched and bool(found)

    @contextlib.contextmanager
    def given(self, rows: Sequence[int]) -> Iterator[None]:
        """Within this context, the model takes these rows' features from the cache."""
        assert self._owner is not None
        self._rows = [int(row) for row in rows]
        self._owner.get_image_features = self._replacement
        try:
            yield
        finally:
            del self._owner.get_image_features

    def of(self, row: int) -> dict[str, Any]:
        """One row's features by field; empty if the model's output has an unknown form."""
        picture = self._pictures.get(row)
        if picture in self._kept:
            return self._kept[picture]
        inputs = self._inputs(row)
        picture = self._pictures[row] = picture or digest(inputs)
        if picture in self._places and self._spool is not None:
            device = next(iter(inputs.values())).device
            return each(self._spool.get(self._places[picture]), lambda t: t.to(device))
        if picture in self._earlier:
            self._kept[picture] = self._earlier.pop(picture)
        if picture in self._kept:  # cached for another row with the same picture
            return self._kept[picture]
        found = self._look(inputs)
        self._keep(picture, found)
        return found

    @torch.no_grad()
    def _look(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        with self._evaluating():
            out = self._compute(**{n: inputs[n] for n in self._takes if n in inputs})
        self._kind = type(out)
        return {f: out[f] for f in FIELDS if isinstance(out, dict) and out.get(f) is not None}

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Puts the image side in evaluation mode; one switch, which is slow, serves many rows."""
        assert self._owner is not None
        training = self._owner.training
        if training:
            self._owner.eval()
        try:
            yield
        finally:
            if training:
                self._owner.train()

    def _keep(self, picture: str, found: dict[str, Any]) -> None:
        size = nbytes(found)
        if size > self._room:
            self._room += nbytes(self._earlier)
            self._earlier.clear()
        if size <= self._room:
            self._room -= size
            self._kept[picture] = found
        elif self._spool and (places := self._spool.put(found)) is not None:
            self._places[picture] = places

    def _hand_out(self) -> Any:
        known = all(self._pictures.get(row) in self._kept for row in self._rows)
        with contextlib.nullcontext() if known else self._evaluating():
            rows = [self.of(row) for row in self._rows]
        out = self._kind()  # its other fields stay None; nothing reads them
        for name in rows[0]:
            values = [row[name] for row in rows]
            layered = name == "deepstack_features"
            out[name] = [join(v) for v in zip(*values, strict=True)] if layered else join(values)
        return out


def _taken_over(model: str, kept: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Takes what an earlier run left for this model; leaves ``kept`` to the next run."""
    handed = _handed.get()
    if handed is None:
        return {}
    earlier = handed.kept if handed.model == model else {}
    handed.model, handed.kept = model, kept
    return earlier


def join(values: Sequence[Any]) -> Any:
    """The rows' features in the form of a batch's: one tensor, or one tensor per image."""
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return [tensor for value in values for tensor in value]


def image_side(model: Any) -> Any:
    """The innermost module that computes image features; None if the model has none."""
    owners = [m for m in model.modules() if hasattr(type(m), "get_image_features")]
    return owners[-1] if owners else None

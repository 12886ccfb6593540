"""Frozen image features, computed once for each row's picture and kept.

Where LoRA is in the language model only, what the vision tower and the projector make of a picture
never changes. ``get_image_features``, which the models' own forward and generation call, is
replaced by one that hands out what is kept: in memory up to a budget, then on disk. A row's
features are always computed alone, so that they are the same whatever batch asks for them first,
also after a run was resumed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedvlm.models.cohort import StackedLora
from fedvlm.models.spool import Spool, each, nbytes

FIELDS = ("pooler_output", "deepstack_features")  # what the models' forward reads


class ImageFeatures:
    """The image features of a data set's rows.

    Args:
        model: whose LoRA layers are stacked.
        inputs: a row's inputs other than the text ``{name: [1 or patches, ...]}``, on the device.
        budget: bytes that may be kept in memory.
        spool: takes what goes beyond; rows that do not fit there are computed every time.
    """

    def __init__(
        self,
        model: Any,
        inputs: Callable[[int], dict[str, Tensor]],
        budget: int,
        spool: Spool | None = None,
    ):
        self._owner = image_side(model)
        self._inputs = inputs
        self._room = budget
        self._spool = spool
        self._kept: dict[int, dict[str, Any]] = {}
        self._places: dict[int, Any] = {}  # of the rows on disk
        self._rows: list[int] = []
        if self._owner is not None:
            self._compute = self._owner.get_image_features
            names = inspect.signature(self._compute).parameters
            self._takes = [n for n in names if n not in ("self", "kwargs")]
            # Generation asks for the parameters' names.
            self._replacement = functools.wraps(self._compute)(
                lambda *args, **kwargs: self._hand_out()
            )

    def usable(self, row: int) -> bool:
        """Whether the features can be kept: no LoRA layer has a part in them."""
        if self._owner is None:
            return False
        touched: list[StackedLora] = []
        layers = [m for m in self._owner.modules() if isinstance(m, StackedLora)]
        hooks = [m.register_forward_hook(lambda m, *_: touched.append(m)) for m in layers]
        try:
            found = self.of(row)
        finally:
            for hook in hooks:
                hook.remove()
        return not touched and bool(found)

    @contextmanager
    def given(self, rows: Sequence[int]) -> Iterator[None]:
        """The model's next calls are on these rows: their pictures are not looked at again."""
        assert self._owner is not None
        self._rows = [int(row) for row in rows]
        self._owner.get_image_features = self._replacement
        try:
            yield
        finally:
            del self._owner.get_image_features

    @torch.no_grad()
    def of(self, row: int) -> dict[str, Any]:
        """One row's features by field; empty where the model's output is of an unknown form."""
        if row in self._kept:
            return self._kept[row]
        inputs = self._inputs(row)
        if row in self._places and self._spool is not None:
            device = next(iter(inputs.values())).device
            return each(self._spool.get(self._places[row]), lambda t: t.to(device))
        assert self._owner is not None
        training = self._owner.training
        self._owner.eval()
        out = self._compute(**{n: inputs[n] for n in self._takes if n in inputs})
        self._owner.train(training)
        self._kind = type(out)
        found = {f: out[f] for f in FIELDS if isinstance(out, dict) and out.get(f) is not None}
        if nbytes(found) <= self._room:
            self._room -= nbytes(found)
            self._kept[row] = found
        elif self._spool and (places := self._spool.put(found)) is not None:
            self._places[row] = places
        return found

    def _hand_out(self) -> Any:
        rows = [self.of(row) for row in self._rows]
        out = self._kind()  # its other fields are None: nothing reads them
        for name in rows[0]:
            values = [row[name] for row in rows]
            layered = name == "deepstack_features"
            out[name] = [join(v) for v in zip(*values, strict=True)] if layered else join(values)
        return out


def join(values: Sequence[Any]) -> Any:
    """The rows' features as the model gives a batch's: one tensor, or a tensor an image."""
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return [tensor for value in values for tensor in value]


def image_side(model: Any) -> Any:
    """The innermost module that computes image features; None where the model has none."""
    owners = [m for m in model.modules() if hasattr(type(m), "get_image_features")]
    return owners[-1] if owners else None

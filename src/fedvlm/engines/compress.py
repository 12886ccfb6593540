"""Compression, a stage on the wire: fewer bytes for the same tensors, with any algorithm.

What is compressed is the *change*: where a tensor of an upload has the name and the shape of one
that the client was sent, the difference of the two; any other tensor as it is. The server
knows what it sent and adds the difference to it. So a LoRA factor loses precision of its round's
step alone, not of its value.

- ``bf16``: half the bytes, 8 significant bits an element.
- ``int8``: whole numbers from -127 to 127 times a scale, one for each row of a matrix, or of its
  transpose where that has fewer: for each rank, as a rule.
- ``topk``: the elements of the largest magnitude of the whole upload, and where they are.

With ``int8`` and ``topk``, what was not sent is added to the client's next change before that is
compressed (error feedback: Seide et al., Interspeech 2014; Stich et al., arXiv 1809.07599;
Karimireddy et al., arXiv 1901.09847). The sum of what the server got of a client lacks no more than
this rest, whatever the number of rounds. The rest is the stage's memory at the client. It is a rest
of the round's step only where clients begin at the download; elsewhere (``Entry.partial``) ``topk``
is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from fedvlm.algorithms.base import Visit
from fedvlm.engines.stages import Stage
from fedvlm.tree import Tree, change

if TYPE_CHECKING:
    from torch import Tensor

    from fedvlm.settings.sections import WireConfig

SCALES, VALUES, INDICES = "scales", "values", "indices"


@dataclass(frozen=True)
class Codec:
    """How tensors become a message.

    Attributes:
        pack: from float32 tensors to a message, whose names and shapes follow from theirs.
        unpack: the inverse, up to what is lost; ValueError for a message that none made.
        feedback: whether what is lost is added to the next change.
    """

    pack: Callable[[Tree], Tree]
    unpack: Callable[[Tree], Tree]
    feedback: bool = True


def compression(settings: WireConfig) -> tuple[Stage, ...]:
    """The stage that a run's settings name; none where uploads travel as they are."""
    if settings.compress == "none":
        return ()
    codec = {
        "bf16": Codec(_halved, _widened, feedback=False),
        "int8": Codec(_rounded, _scaled),
        "topk": Codec(partial(_largest, settings.topk), _scattered),
    }[settings.compress]

    def pack(up: Tree, down: Tree, memory: Tree, visit: Visit) -> tuple[Tree, Tree]:
        steps = change(down, up)
        due = {n: t.float() + memory[n] if n in memory else t.float() for n, t in steps.items()}
        message = codec.pack(due)
        if not codec.feedback:
            return message, {}
        sent = codec.unpack(message)
        return message, {**memory, **{n: t - sent[n] for n, t in due.items()}}

    def open_(message: Tree, down: Tree) -> Tree:
        return {n: _based(down, n, step) for n, step in codec.unpack(message).items()}

    return (Stage("compress", pack, open_),)


def _based(down: Tree, name: str, step: Tensor) -> Tensor:
    """The tensor whose change this is."""
    base = down.get(name)
    return step if base is None or base.shape != step.shape else base + step.to(base.dtype)


# bf16


def _halved(tree: Tree) -> Tree:
    return {n: t.bfloat16() for n, t in tree.items()}


def _widened(message: Tree) -> Tree:
    return {n: t.float() for n, t in message.items()}


# int8


def _rounded(tree: Tree) -> Tree:
    import torch

    message, scales = {}, []
    for name, tensor in sorted(tree.items()):
        rows, across = _rows(tensor)
        scale = rows.abs().amax(1) / 127  # [rows]
        levels = (rows / torch.where(scale > 0, scale, 1.0)[:, None]).round()
        levels = levels.mT.reshape(tensor.shape) if across else levels.view(tensor.shape)
        message[name] = levels.to(torch.int8)
        scales.append(scale)
    return {**message, SCALES: torch.cat(scales)}


def _scaled(message: Tree) -> Tree:
    whole, first, found = message[SCALES], 0, {}
    for name in sorted(message.keys() - {SCALES}):
        levels = message[name]
        rows, across = _rows(levels.float())
        last = first + len(rows)
        real = rows * whole[first:last, None]
        found[name] = real.mT.reshape(levels.shape) if across else real.view(levels.shape)
        first = last
    return found


def _rows(tensor: Tensor) -> tuple[Tensor, bool]:
    """``[rows, elements]`` of a tensor, and whether these are the columns of its matrix."""
    if tensor.dim() < 2:
        return tensor.reshape(1, -1), False
    matrix = tensor.flatten(1)
    across = matrix.shape[0] > matrix.shape[1]
    return (matrix.mT if across else matrix), across


# topk


def _largest(fraction: float, tree: Tree) -> Tree:
    """The largest elements, and, without elements, the names and shapes of all tensors."""
    import torch

    flat = torch.cat([tree[n].flatten() for n in sorted(tree)])
    count = math.ceil(fraction * len(flat))
    where = flat.abs().topk(count).indices.sort().values
    shapes = {n: t.new_empty((0, *t.shape)) for n, t in tree.items()}
    return {**shapes, VALUES: flat[where], INDICES: where.to(torch.int32)}


def _scattered(message: Tree) -> Tree:
    names = sorted(message.keys() - {VALUES, INDICES})
    shapes = [message[n].shape[1:] for n in names]
    bounds = [0, *(math.prod(shape) for shape in shapes)]
    for n in range(1, len(bounds)):
        bounds[n] += bounds[n - 1]
    values, where = message[VALUES], message[INDICES].long()
    if not where.is_meta and not _rising(where, bounds[-1]):
        raise ValueError(f"has indices that are not rising, or not below {bounds[-1]}")
    flat = values.new_zeros(bounds[-1]).scatter(0, where, values)
    pieces = [flat[first:last] for first, last in pairwise(bounds)]
    return {n: t.view(s) for n, t, s in zip(names, pieces, shapes, strict=True)}


def _rising(where: Tensor, end: int) -> bool:
    inside = len(where) == 0 or (int(where[0]) >= 0 and int(where[-1]) < end)
    return inside and bool((where[1:] > where[:-1]).all())

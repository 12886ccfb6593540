"""Compression, a stage on the wire: fewer bytes for the same tensors, with any algorithm.

The stage compresses the *change*: the difference between a tensor of the upload and the tensor of
the download with the same name and shape. A tensor without such a counterpart is compressed whole.
The server adds the change to the download. So compression costs precision in the step of a round,
not in the value of a LoRA factor.

- ``bf16``: half the bytes, 8 significant bits an element.
- ``int8``: integers from -127 to 127 and a scale for each row of a matrix, or for each column where
  there are fewer columns. For LoRA factors this is, as a rule, one scale for each rank.
- ``topk``: the elements of the largest magnitude in the whole upload, and their positions.

With ``int8`` and ``topk``, the part that was not sent (the rest) is added to the client's next
change before compression (error feedback: Seide et al., Interspeech 2014; Stich et al., arXiv
1809.07599; Karimireddy et al., arXiv 1901.09847). So the sum of a client's changes at the server
lacks no more than one rest, whatever the number of rounds. The rest is the stage's memory at the
client. It belongs to the step of the round only where clients begin at the download. Algorithms
whose clients may begin elsewhere (``Entry.partial``) refuse ``topk``.
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
    """A method of compression.

    Attributes:
        pack: from float32 tensors to a message; names and shapes of the message depend only on
            names and shapes of the tensors.
        unpack: the inverse, up to the loss; ValueError for a message that ``pack`` cannot make.
        feedback: whether the loss is added to the next change.
    """

    pack: Callable[[Tree], Tree]
    unpack: Callable[[Tree], Tree]
    feedback: bool = True


def compression(settings: WireConfig) -> tuple[Stage, ...]:
    """The compression stage of a run's settings; empty without compression."""
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
    """The tensor of the upload, from its change and the download."""
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
    """A tensor as ``[rows, elements]``, and whether these rows are columns of its matrix."""
    if tensor.dim() < 2:
        return tensor.reshape(1, -1), False
    matrix = tensor.flatten(1)
    across = matrix.shape[0] > matrix.shape[1]
    return (matrix.mT if across else matrix), across


# topk


def _largest(fraction: float, tree: Tree) -> Tree:
    """The largest elements, with empty tensors that carry the names and shapes of all tensors."""
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

"""Compressed uploads: any algorithm, whose clients send fewer bytes for the same tensors.

What is compressed is the *change*: where a tensor of an upload has the name and the shape of one
that the client was sent, the difference of the two; any other tensor as it is. The server, which
knows what it sent, adds the difference to that. So a LoRA factor loses precision of its round's
step alone, not of its value.

- ``bf16``: half the bytes, 8 significant bits an element.
- ``int8``: whole numbers from -127 to 127 times a scale, one for each row of a matrix, or of its
  transpose where that has fewer: for each rank, as a rule.
- ``topk``: the elements of the largest magnitude of the whole upload, and where they are.

With ``int8`` and ``topk`` what was not sent is added to the client's next change before that is
compressed (error feedback: Seide et al., Interspeech 2014; Stich et al., arXiv 1809.07599;
Karimireddy et al., arXiv 1901.09847). The sum of what the server got of a client lacks no more than
this rest, whatever the number of rounds. The rest stays at the client, beside what the algorithm
keeps, which does not see it. It is a rest of the round's step only where clients begin at what they
were sent; where they do not (``Entry.partial``), ``topk`` is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from fedvlm.algorithms.base import Algorithm, Phase, Term, Work, everywhere
from fedvlm.tree import Tree, change, named, part

if TYPE_CHECKING:
    from torch import Tensor

    from fedvlm.settings.sections import WireConfig

UNSENT = "unsent"
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


def compressed(algorithm: Algorithm, settings: WireConfig) -> Algorithm:
    """``algorithm``, whose uploads are compressed at the client and restored at the server."""
    if settings.compress == "none":
        return algorithm
    codec = {
        "bf16": Codec(_halved, _widened, feedback=False),
        "int8": Codec(_rounded, _scaled),
        "topk": Codec(partial(_largest, settings.topk), _scattered),
    }[settings.compress]

    def change_of(one: Algorithm) -> Algorithm:
        def finish(work: Work) -> tuple[Tree, Tree]:
            upload, kept = one.finish(replace(work, mine=_own(work.mine)))
            if not upload:
                return {}, kept
            unsent = part(work.mine, UNSENT)
            steps = change(work.down, upload)
            due = {n: t.float() + unsent[n] if n in unsent else t.float() for n, t in steps.items()}
            message = codec.pack(due)
            if codec.feedback:
                sent = codec.unpack(message)
                unsent |= {n: t - sent[n] for n, t in due.items()}
            return message, {**kept, **named(UNSENT, unsent)}

        def decode(message: Tree, down: Tree) -> Tree:
            steps = codec.unpack(message) if message else {}
            return {n: _based(down, n, step) for n, step in steps.items()}

        def options(adapter: Tree, down: Tree, mine: Tree) -> list[Tree]:
            assert one.options is not None
            return list(one.options(adapter, down, _own(mine)))

        return replace(
            one,
            start=lambda adapter, down, mine: one.start(adapter, down, _own(mine)),
            phases=tuple(map(_phase, one.phases)),
            finish=finish,
            decode=decode,
            options=options if one.options else None,
        )

    return everywhere(change_of, algorithm)


def _own(mine: Tree) -> Tree:
    """What the algorithm itself keeps."""
    return {n: t for n, t in mine.items() if not n.startswith(f"{UNSENT}/")}


def _phase(given: Phase) -> Phase:
    begin = given.begin

    def term(one: Term) -> Term:
        return replace(one, constant=lambda down, mine: one.constant(down, _own(mine)))

    return replace(
        given,
        begin=(lambda down, mine, now: begin(down, _own(mine), now)) if begin else None,
        terms=tuple(map(term, given.terms)),
    )


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

"""The products of a linear layer with many clients' factors, forward and back, in few operations.

A sum ``W x + s B A x`` needs a frozen product, two thin products and a cast where the base is in
half precision. Autograd adds copies, casts and scalings of its own, and one gradient tensor for
each factor. These functions add their products in place: thin products to the layer's output, and
gradients to those of the runs (:mod:`fedvlm.models.runs`). The scale is a number of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedvlm.models.blocks import Blocks
from fedvlm.models.once import once
from fedvlm.models.runs import Place


class Active(NamedTuple):
    """The factors of the active clients, and their gradients; views where these are neighbours.

    Attributes:
        stamp: the choice of clients that this belongs to.
        a: ``[clients, ranks of all layers, in]``.
        a_turned: the same, ``[clients, in, ranks of all layers]``.
        b: ``[clients, rank, out]`` of each layer.
        b_turned: the same, ``[clients, out, rank]``.
        a_sum: adds a product to the gradient of the As; None if they are not trained.
        b_sums: the same for each B.
    """

    stamp: object
    a: Tensor
    a_turned: Tensor
    b: list[Tensor]
    b_turned: list[Tensor]
    a_sum: Sum | None
    b_sums: list[Sum | None]


class Sum:
    """Adds scaled products to the gradient of the active clients.

    Args:
        grad: the gradient of all loaded clients, ``[clients, ...]``.
        clients: the active clients.
        scaling: factor of the products.
    """

    def __init__(self, grad: Tensor, clients: slice | Tensor, scaling: float):
        self._scaling = scaling
        self._clients = clients if isinstance(clients, Tensor) else None
        self._grad = grad if isinstance(clients, Tensor) else grad[clients]
        self._whole = self._clients is None and self._grad.is_contiguous()

    def add(self, left: Tensor, right: Tensor) -> None:
        """Adds ``left right`` of each active client."""
        if self._whole:
            self._grad.baddbmm_(left, right, alpha=self._scaling)
        elif self._clients is not None:
            product = torch.bmm(left, right)
            self._grad.index_add_(0, self._clients, product, alpha=self._scaling)
        else:  # in place, a product on a CPU would fall apart into one for each client
            self._grad.add_(torch.bmm(left, right), alpha=self._scaling)


class Factors:
    """The factors of layers that read one tensor, most often of one layer.

    Args:
        blocks: the active clients.
        scaling: factor of the product ``B A``.
        a: the places of the As, one below the other in one piece.
        b: the places of the Bs.
    """

    def __init__(self, blocks: Blocks, scaling: float, a: Sequence[Place], b: Sequence[Place]):
        self.blocks, self.scaling = blocks, scaling
        self._as, self._b = list(a), list(b)
        whole = slice(a[0].ranks.start, a[-1].ranks.stop)
        self._a = Place(a[0].run, a[0].piece, whole, turned=False)
        self.ranks = [slice(p.ranks.start - whole.start, p.ranks.stop - whole.start) for p in a]
        self.dtype, self.rank = a[0].run.dtype, self.ranks[0].stop - self.ranks[0].start
        runs = {id(place.run): place.run for place in (self._a, *b)}
        self.runs = list(runs.values())
        self._active: Active | None = None

    @property
    def in_one_piece(self) -> bool:
        """Whether the As lie one below the other."""
        first = self._as[0]
        return all(p.run is first.run and p.piece == first.piece for p in self._as)

    @property
    def active(self) -> Active:
        """The factors of the active clients."""
        stamp, known = self.blocks.stamp, self._active
        if known is not None and known.stamp is stamp:
            return known
        own = [place.piece_of(place.run.detach()) for place in (self._a, *self._b)]
        a, *b = map(self.blocks.chosen, own)
        a_turned, *b_turned = (part.transpose(1, 2) for part in (a, *b))
        a_sum, *b_sums = map(self._sum, (self._a, *self._b))
        self._active = Active(stamp, a, a_turned, b, b_turned, a_sum, b_sums)
        return self._active

    def _sum(self, place: Place) -> Sum | None:
        if place.run.grad is None:
            return None
        grad = place.piece_of(place.run.grad)
        return Sum(grad, self.blocks.clients_of_batch(grad.device), self.scaling)

    def own(self, x: Tensor) -> tuple[Tensor, ...]:
        """The runs that autograd must know: none where the outputs depend on ``x`` anyway.

        Gradients of the runs are added in a backward pass, which returns none for them.
        """
        return () if x.requires_grad else tuple(self.runs)

    def parts(self, low: Tensor) -> Sequence[Tensor]:
        """Each layer's part of the products with all As."""
        return (low,) if len(self.ranks) == 1 else [low[..., own] for own in self.ranks]


class Thin(torch.autograd.Function):
    """Linear layers that read one tensor, with two thin products each for the factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factors: Factors, bases: Sequence[nn.Linear], *runs: Tensor
    ) -> tuple[Tensor, ...]:
        """``[blocks of rows..., in] -> [..., out]`` of each layer; runs: :meth:`Factors.own`."""
        own = factors.active
        wide, low = _down(factors, own, x)
        weights = [base.weight for base in bases]
        ctx.factors, ctx.weights, ctx.none = factors, weights, (None,) * (2 + len(runs))
        ctx.save_for_backward(wide, low)
        outputs = []
        for base, weight, part, b in zip(bases, weights, factors.parts(low), own.b, strict=True):
            y = nn.functional.linear(x, weight, base.bias)
            outputs.append(_added(factors, y, part, b))
        return tuple(outputs)

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factors, (wide, low) = ctx.factors, ctx.saved_tensors
        own = factors.active
        inner = _back_up(factors, own, low, grads)
        if own.a_sum:
            own.a_sum.add(inner.transpose(1, 2), wide)
        of_x = None
        if ctx.needs_input_grad[0]:
            for grad, weight in zip(grads, ctx.weights, strict=True):
                flat = grad.reshape(-1, grad.shape[-1])
                of_x = flat.mm(weight) if of_x is None else of_x.addmm_(flat, weight)
            assert of_x is not None
            shape = (*grads[0].shape[:-1], of_x.shape[-1])
            of_x = _added(factors, of_x.view(shape), inner, own.a)
        return of_x, *ctx.none


class Beside(torch.autograd.Function):
    """The part of the factors alone, for a layer whose base or input is not plain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Factors, width: int, *runs: Tensor) -> Tensor:
        """``[blocks of rows..., in] -> [..., out]``, in the precision of the factors."""
        own = factors.active
        wide, low = _down(factors, own, x)
        ctx.factors, ctx.form, ctx.none = factors, (x.shape, x.dtype), (None,) * (2 + len(runs))
        ctx.save_for_backward(wide, low)
        product = torch.bmm(low, own.b[0]).mul_(factors.scaling)
        return factors.blocks.unblocks(product, (*x.shape[:-1], width))

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factors, (wide, low), (shape, dtype) = ctx.factors, ctx.saved_tensors, ctx.form
        own = factors.active
        inner = _back_up(factors, own, low, [grad])
        if own.a_sum:
            own.a_sum.add(inner.transpose(1, 2), wide)
        of_x = None
        if ctx.needs_input_grad[0]:
            product = torch.bmm(inner, own.a).mul_(factors.scaling)
            of_x = factors.blocks.unblocks(product, shape).to(dtype)
        return of_x, *ctx.none


class Whole(torch.autograd.Function):
    """A linear layer with one whole weight ``W + s B A`` for each client."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Factors, base: nn.Linear, *runs: Tensor) -> Tensor:
        """``[blocks of rows..., in] -> [..., out]``."""
        blocks, own = factors.blocks, factors.active
        # [clients, out, in]
        weights = torch.baddbmm(base.weight, own.b_turned[0], own.a, alpha=factors.scaling)
        wide = blocks.blocks(x)
        ctx.factors, ctx.shape, ctx.none = factors, x.shape, (None,) * (2 + len(runs))
        ctx.save_for_backward(wide, weights)
        y = torch.bmm(wide, weights.transpose(1, 2))
        if base.bias is not None:
            y.add_(base.bias)
        return blocks.unblocks(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factors, (wide, weights) = ctx.factors, ctx.saved_tensors
        own, active = factors.blocks.blocks(grad), factors.active
        of_weights = torch.bmm(own.transpose(1, 2), wide)  # [clients, out, in]
        if active.b_sums[0]:
            active.b_sums[0].add(active.a, of_weights.transpose(1, 2))
        if active.a_sum:
            active.a_sum.add(active.b[0], of_weights)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = factors.blocks.unblocks(torch.bmm(own, weights), ctx.shape)
        return of_x, *ctx.none


class OneAdapter(torch.autograd.Function):
    """The product with one adapter for all places, and the gradient of every place.

    The products are as wide as those of a single client. Only the gradients of the factors are
    computed place by place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """``[places, entries, in] -> [..., out]``; ``a`` and ``b`` repeat one factor each."""
        low = nn.functional.linear(x, a[0])
        ctx.scaling = scaling
        ctx.save_for_backward(x, low, a, b)
        return nn.functional.linear(low, scaling * b[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, low, a, b = ctx.saved_tensors
        inner = grad @ (ctx.scaling * b[0])  # [places, entries, rank]
        of_x = inner @ a[0] if ctx.needs_input_grad[0] else None
        of_a = torch.bmm(inner.transpose(1, 2), x) if ctx.needs_input_grad[1] else None
        of_b = None
        if ctx.needs_input_grad[2]:
            # The factor with the rank comes first: the other order takes four times as long.
            of_b = torch.bmm((ctx.scaling * low).transpose(1, 2), grad).transpose(1, 2)
        return of_x, of_a, of_b, None


def _down(factors: Factors, own: Active, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input in blocks, ``[clients, entries, in]``, and its product with the As."""
    wide = factors.blocks.blocks(x if x.dtype is factors.dtype else x.to(factors.dtype))
    return wide, torch.bmm(wide, own.a_turned)


def _back_up(factors: Factors, own: Active, low: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """Adds the gradients of the Bs; returns the gradient of ``low`` over the scale."""
    dtype, blocks, inner = factors.dtype, factors.blocks.blocks, []
    for part, grad, b, summed in zip(
        factors.parts(low), grads, own.b_turned, own.b_sums, strict=True
    ):
        each = blocks(grad if grad.dtype is dtype else grad.to(dtype))
        if summed:
            summed.add(part.transpose(1, 2), each)
        inner.append(torch.bmm(each, b))
    return inner[0] if len(inner) == 1 else torch.cat(inner, 2)


def _added(factors: Factors, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``y`` plus the scaled product ``left right`` ``[clients, entries, ...]``, in place."""
    blocks, scaling = factors.blocks, factors.scaling
    if blocks.side_by_side:
        each = y.view(left.shape[0], -1, y.shape[-1])
        if y.dtype is left.dtype:
            each.baddbmm_(left, right, alpha=scaling)
        else:
            each.add_(torch.bmm(left, right), alpha=scaling)
        return y
    return y.add_(blocks.unblocks(torch.bmm(left, right), y.shape), alpha=scaling)

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
from torch.autograd.function import once_differentiable

from fedvlm.models.blocks import Blocks
from fedvlm.models.runs import Place


class Active(NamedTuple):
    """The factors of the active clients, and their gradients; views where these are neighbours.

    Attributes:
        stamp: the choice of clients that this belongs to.
        a: ``[clients, ranks of all layers, in]``.
        b: ``[clients, rank, out]`` of each layer.
        a_grad: the gradient of the As; None if they are not trained.
        b_grads: the gradient of each B; None if it is not trained.
    """

    stamp: object
    a: Tensor
    b: list[Tensor]
    a_grad: Tensor | None
    b_grads: list[Tensor | None]


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
        if self._active is None or self._active.stamp is not self.blocks.stamp:
            own = [place.piece_of(place.run.detach()) for place in (self._a, *self._b)]
            a, *b = map(self.blocks.chosen, own)
            a_grad, *b_grads = map(self._grad, (self._a, *self._b))
            self._active = Active(self.blocks.stamp, a, b, a_grad, b_grads)
        return self._active

    def _grad(self, place: Place) -> Tensor | None:
        if place.run.grad is None:
            return None
        grad = place.piece_of(place.run.grad)
        clients = self.blocks.clients_of_batch(grad.device)
        return grad if isinstance(clients, Tensor) else grad[clients]

    def add(self, grad: Tensor | None, left: Tensor, right: Tensor) -> None:
        """Adds a scaled product to a gradient of :attr:`active`, if the factor is trained."""
        if grad is None:
            return
        clients = self.blocks.clients_of_batch(grad.device)
        if isinstance(clients, Tensor):
            grad.index_add_(0, clients, torch.bmm(left, right), alpha=self.scaling)
        elif grad.is_contiguous():
            grad.baddbmm_(left, right, alpha=self.scaling)
        else:  # in place, a product on a CPU would fall apart into one for each client
            grad.add_(torch.bmm(left, right), alpha=self.scaling)

    def low(self, low: Tensor, layer: int) -> Tensor:
        """A layer's part of the products with all As."""
        return low if len(self.ranks) == 1 else low[..., self.ranks[layer]]


class Thin(torch.autograd.Function):
    """Linear layers that read one tensor, with two thin products each for the factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factors: Factors, bases: Sequence[nn.Linear], *runs: Tensor
    ) -> tuple[Tensor, ...]:
        """``[blocks of rows..., in] -> [..., out]`` of each layer.

        Autograd learns from ``runs`` that the outputs depend on them; their gradients are added in
        :meth:`backward`, which returns none.
        """
        wide, low = _down(factors, x)
        ctx.factors, ctx.weights, ctx.shape = factors, [base.weight for base in bases], x.shape
        ctx.save_for_backward(wide, low)
        outputs = [nn.functional.linear(x, base.weight, base.bias) for base in bases]
        return tuple(_up(factors, k, low, y) for k, y in enumerate(outputs))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factors, (wide, low) = ctx.factors, ctx.saved_tensors
        inner = _back_up(factors, low, grads)
        factors.add(factors.active.a_grad, inner.transpose(1, 2), wide)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = _flat(grads[0]) @ ctx.weights[0]
            for grad, weight in zip(grads[1:], ctx.weights[1:], strict=True):
                of_x.addmm_(_flat(grad), weight)
            of_x = _added(factors, of_x.view(ctx.shape), inner, factors.active.a)
        return of_x, None, None, *[None] * len(factors.runs)


class Beside(torch.autograd.Function):
    """The part of the factors alone, for a layer whose base or input is not plain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Factors, width: int, *runs: Tensor) -> Tensor:
        """``[blocks of rows..., in] -> [..., out]``, in the precision of the factors."""
        wide, low = _down(factors, x)
        ctx.factors, ctx.form = factors, (x.shape, x.dtype)
        ctx.save_for_backward(wide, low)
        product = torch.bmm(low, factors.active.b[0]).mul_(factors.scaling)
        return factors.blocks.unblocks(product, (*x.shape[:-1], width))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factors, (wide, low), (shape, dtype) = ctx.factors, ctx.saved_tensors, ctx.form
        inner = _back_up(factors, low, [grad])
        factors.add(factors.active.a_grad, inner.transpose(1, 2), wide)
        of_x = None
        if ctx.needs_input_grad[0]:
            product = torch.bmm(inner, factors.active.a).mul_(factors.scaling)
            of_x = factors.blocks.unblocks(product, shape).to(dtype)
        return of_x, None, None, *[None] * len(factors.runs)


class Whole(torch.autograd.Function):
    """A linear layer with one whole weight ``W + s B A`` for each client."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Factors, base: nn.Linear, *runs: Tensor) -> Tensor:
        """``[blocks of rows..., in] -> [..., out]``."""
        blocks, own = factors.blocks, factors.active
        b = own.b[0].transpose(1, 2)
        weights = torch.baddbmm(base.weight, b, own.a, alpha=factors.scaling)  # [clients, out, in]
        wide = blocks.blocks(x)
        ctx.factors, ctx.shape = factors, x.shape
        ctx.save_for_backward(wide, weights)
        y = torch.bmm(wide, weights.transpose(1, 2))
        if base.bias is not None:
            y.add_(base.bias)
        return blocks.unblocks(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factors, (wide, weights) = ctx.factors, ctx.saved_tensors
        own, active = factors.blocks.blocks(grad), factors.active
        of_weights = torch.bmm(own.transpose(1, 2), wide)  # [clients, out, in]
        factors.add(active.b_grads[0], active.a, of_weights.transpose(1, 2))
        factors.add(active.a_grad, active.b[0], of_weights)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = factors.blocks.unblocks(torch.bmm(own, weights), ctx.shape)
        return of_x, None, None, *[None] * len(factors.runs)


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


def _down(factors: Factors, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input in blocks, ``[clients, entries, in]``, and its product with the As."""
    wide = factors.blocks.blocks(x.to(factors.dtype))
    return wide, torch.bmm(wide, factors.active.a.transpose(1, 2))


def _up(factors: Factors, layer: int, low: Tensor, y: Tensor) -> Tensor:
    """Adds a layer's product with B to its output, in place."""
    return _added(factors, y, factors.low(low, layer), factors.active.b[layer])


def _back_up(factors: Factors, low: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """Adds the gradients of the Bs; returns the gradient of ``low`` over the scale."""
    active, inner = factors.active, []
    for k, grad in enumerate(grads):
        own = factors.blocks.blocks(grad.to(factors.dtype))
        factors.add(active.b_grads[k], factors.low(low, k).transpose(1, 2), own)
        inner.append(torch.bmm(own, active.b[k].transpose(1, 2)))
    return inner[0] if len(inner) == 1 else torch.cat(inner, 2)


def _added(factors: Factors, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``y`` plus the scaled product ``left right`` ``[clients, entries, ...]``, in place."""
    blocks, scaling = factors.blocks, factors.scaling
    if y.dtype == left.dtype and blocks.side_by_side:
        y.view(len(left), -1, y.shape[-1]).baddbmm_(left, right, alpha=scaling)
        return y
    return y.add_(blocks.unblocks(torch.bmm(left, right), y.shape), alpha=scaling)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

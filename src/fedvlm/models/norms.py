"""The frozen RMS norms of a base in half as many operations, while it trains.

A norm such as Llama's takes 8 operations forward and 14 back, and a model has two for each layer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fedvlm.models.once import once


class RmsNorm(torch.autograd.Function):
    """``weight * x / sqrt(mean(x * x) + eps)`` over the last axis, with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
        """``[..., width] -> [..., width]``; the statistics are in single precision.

        Args:
            ctx: autograd's.
            x: the input.
            weight: ``[width]``.
            eps: a scalar in single precision.
        """
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(eps, size, size, value=1 / x.shape[-1]).rsqrt_()
        normal = x * scale
        ctx.save_for_backward(normal, scale, weight)
        ctx.dtype = x.dtype
        return normal.to(x.dtype) * weight

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normal, scale, weight = ctx.saved_tensors
        inner = torch.mul(grad, weight, out=torch.empty_like(normal))
        along = (inner * normal).mean(-1, keepdim=True)
        inner.addcmul_(normal, along, value=-1.0)
        of_x = torch.mul(inner, scale, out=torch.empty_like(normal, dtype=ctx.dtype))
        return of_x, None, None


class Norm:
    """The forward pass of a norm: its own, or in fewer operations where gradients are computed."""

    def __init__(self, module: nn.Module):
        self._module, self._own = module, type(module).forward
        weight: Tensor = module.weight  # type: ignore[assignment]
        self._eps = torch.tensor(module.variance_epsilon, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        weight: Tensor = self._module.weight  # type: ignore[assignment]  # gathered, if it is shared
        if torch.is_grad_enabled() and x.requires_grad and x.dtype == weight.dtype:
            return RmsNorm.apply(x, weight, self._eps)
        return self._own(self._module, x)

    @torch.no_grad()
    def fits(self) -> bool:
        """Whether both ways give the same values up to rounding, with any weight."""
        like: Tensor = self._module.weight  # type: ignore[assignment]
        weight = torch.linspace(0.5, 1.5, len(like), dtype=like.dtype, device=like.device)
        x = torch.linspace(-2, 3, 4 * len(like), dtype=like.dtype, device=like.device)
        x, probe = x.view(4, -1), copy.copy(self._module)
        probe._parameters = {"weight": nn.Parameter(weight)}
        ours, theirs = RmsNorm.apply(x, weight, self._eps), self._own(probe, x)
        near = 2 * torch.finfo(weight.dtype).eps
        return ours.dtype == theirs.dtype and torch.allclose(ours, theirs, rtol=near, atol=near)


def shorten(model: nn.Module) -> int:
    """Gives the model's RMS norms a shorter forward and backward pass; returns their number.

    A norm is left alone if its class computes another function, or if the model is in double
    precision: such norms compute in single precision, and their gradients would differ by its
    rounding.
    """
    count = 0
    for module in list(model.modules()):
        named = type(module).__name__.endswith("RMSNorm") and "forward" not in vars(module)
        if not named or not hasattr(module, "variance_epsilon"):
            continue
        parameters = list(module.parameters())
        if len(parameters) != 1 or parameters[0].requires_grad or parameters[0].itemsize > 4:
            continue
        norm = Norm(module)
        if norm.fits():
            module.forward = norm  # type: ignore[method-assign]
            count += 1
    return count


def lengthen(model: nn.Module) -> None:
    """Gives norms their own passes back, which have a second derivative."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Norm):
            del module.forward

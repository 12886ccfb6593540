"""Muon for matrices, in fp32 and batched by shape.

torch.optim.Muon orthogonalises in bfloat16, one matrix at a time. On a CPU without bfloat16 units
this takes twice as long as the training step itself.
"""

from __future__ import annotations

from collections import defaultdict

import torch


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates.

    By K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/. Updates are scaled to the
    size of AdamW's updates, so learning rates for AdamW fit.

    Args:
        params: matrices.
        lr: learning rate.
        momentum: momentum of the (Nesterov) moving average of gradients.
        weight_decay: decoupled weight decay, multiplied by `lr`.
        iterations: number of Newton-Schulz iterations.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 5,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "iterations": iterations,
            },
        )

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every matrix that has a gradient."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes[weight.shape].append(weight)
            for shape, weights in shapes.items():
                update = orthogonal(self._averages(weights, group["momentum"]), group["iterations"])
                scale = -group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(update), alpha=scale)

    def _averages(self, weights, momentum: float) -> torch.Tensor:
        made = []
        for weight in weights:
            state = self.state[weight]
            average = state.setdefault("average", torch.zeros_like(weight))
            average.lerp_(weight.grad, 1 - momentum)
            made.append(weight.grad.lerp(average, momentum))
        return torch.stack(made)


def orthogonal(stack: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Approximately the nearest semi-orthogonal matrices of a stack [n, rows, columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, b * gram + c * gram @ gram, x, beta=a)
    return x.mT if tall else x

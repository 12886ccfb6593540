"""Adapters of one layer, and clients whose loss is a formula, for :func:`fedvlm.simulate`."""

from __future__ import annotations

import torch

from fedvlm.algorithms.sharing import sharing
from fedvlm.tree import cut, pad, rank

A = "base_model.model.layers.0.q_proj.lora_A.weight"
B = "base_model.model.layers.0.q_proj.lora_B.weight"


def adapter(ranks=2, out=4, into=5, seed=0):
    """A random A and a zero B."""
    g = torch.Generator().manual_seed(seed)
    return {A: torch.randn(ranks, into, generator=g), B: torch.zeros(out, ranks)}


def pull(target, strength=1.0):
    """The gradient of ``strength / 2 * |w - target|^2``."""
    return lambda name, now: strength * (now - target[name])


FEDAVG = sharing({"": "AB"})
LOCAL = sharing({})
INITIAL = adapter()


def target(seed):
    g = torch.Generator().manual_seed(100 + seed)
    return {n: torch.randn(t.shape, generator=g) for n, t in INITIAL.items()}


def clients(count=3):
    """Clients with different optima and numbers of examples."""
    return {f"c{k}": (1.0 + k, pull(target(k))) for k in range(count)}


def masked(gradient, ranks):
    """The first ranks' own, and none in the others, which are zero in both factors."""

    def found(name, now):
        own = {name: gradient(name, cut({name: now}, 0, 2)[name])}
        return pad(cut(own, 0, ranks), 0, rank({name: now}) - ranks)[name]

    return found


def with_spare(count=3):
    """Clients whose adapter has more than the two ranks that they train."""
    return {c: (weight, masked(g, 2)) for c, (weight, g) in clients(count).items()}


def close(one, other, atol=1e-6):
    return all(torch.allclose(one[n], t, atol=atol) for n, t in other.items())

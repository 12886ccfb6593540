"""Algebra on adapters: flat ``{name: tensor}`` dicts with PEFT's own key names.

A name such as ``base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_A.weight`` says
the module and the factor: ``lora_A`` is ``[rank, in]``, ``lora_B`` is ``[out, rank]``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Size, Tensor, dtype

Tree = dict[str, "Tensor"]
Select = Callable[[str], bool]


@cache
def factor(name: str) -> Literal["A", "B"]:
    """Which LoRA factor a tensor is.

    Raises:
        ValueError: the name is neither ``lora_A`` nor ``lora_B``.
    """
    for part in name.split("."):
        if part in ("lora_A", "lora_embedding_A"):
            return "A"
        if part in ("lora_B", "lora_embedding_B"):
            return "B"
    raise ValueError(f"'{name}' is no LoRA factor: expected lora_A or lora_B in the name")


@cache
def module(name: str) -> str:
    """The adapted module's own name: PEFT's prefix and the factor removed."""
    return name.removeprefix("base_model.model.").split(".lora_", 1)[0]


def split(tree: Mapping[str, Tensor], select: Select) -> tuple[Tree, Tree]:
    """The tensors whose names ``select`` takes, and the others."""
    yes = {n: t for n, t in tree.items() if select(n)}
    return yes, {n: t for n, t in tree.items() if n not in yes}


def step(start: Mapping[str, Tensor], end: Mapping[str, Tensor], rate: float) -> Tree:
    """``start + rate * (end - start)``; exactly ``end`` where ``rate`` is 1."""
    if rate == 1.0:
        return dict(end)
    return {n: t + rate * (end[n] - t) for n, t in start.items()}


def change(down: Mapping[str, Tensor], up: Mapping[str, Tensor]) -> Tree:
    """``up - down``, of the tensors that both have in one shape; the others of ``up`` as is."""
    both = {n for n, t in up.items() if n in down and down[n].shape == t.shape}
    return {n: t - down[n] if n in both else t for n, t in up.items()}


def named(prefix: str, tree: Mapping[str, Tensor]) -> Tree:
    """The tensors under ``prefix/name``, to travel beside factors of the same names."""
    return {f"{prefix}/{n}": t for n, t in tree.items()}


def part(tree: Mapping[str, Tensor], prefix: str) -> Tree:
    """What :func:`named` put there."""
    head = f"{prefix}/"
    return {n.removeprefix(head): t for n, t in tree.items() if n.startswith(head)}


def plain(tree: Mapping[str, Tensor]) -> Tree:
    """The factors without what travels beside them."""
    return {n: t for n, t in tree.items() if "/" not in n}


def cut(tree: Mapping[str, Tensor], first: int, last: int) -> Tree:
    """The ranks from ``first`` up to ``last``, without it: rows of A, columns of B."""
    import torch

    whole = torch.contiguous_format
    parts = {n: (t.mT if factor(n) == "A" else t)[..., first:last] for n, t in tree.items()}
    return {
        n: (t.mT if factor(n) == "A" else t).clone(memory_format=whole) for n, t in parts.items()
    }


def pad(tree: Mapping[str, Tensor], before: int, after: int) -> Tree:
    """Zero ranks before and after those that are there."""
    from torch.nn.functional import pad as padded

    sides = {"A": (0, 0, before, after), "B": (before, after)}
    return {n: padded(t, sides[factor(n)]) for n, t in tree.items()}


def rank(tree: Mapping[str, Tensor]) -> int:
    """How many ranks an adapter has."""
    name, tensor = next(iter(tree.items()))
    return tensor.shape[-2 if factor(name) == "A" else -1]


def mask(name: str, tensor: Tensor, first: int, last: int) -> Tensor:
    """True at the ranks from ``first`` up to ``last``; broadcasts to the factor."""
    import torch

    ranks = torch.arange(rank({name: tensor}), device=tensor.device)
    inside = (ranks >= first) & (ranks < last)
    return inside[:, None] if factor(name) == "A" else inside


def pairs(tree: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Module -> the names of its A and its B."""
    found = {module(n): n for n in tree if factor(n) == "A"}
    return {m: (a, a.replace(".lora_A.", ".lora_B.")) for m, a in found.items()}


def products(tree: Mapping[str, Tensor]) -> Tree:
    """Module -> B A, the change of its weight over the scaling, ``[out, in]``."""
    return {m: tree[b] @ tree[a] for m, (a, b) in pairs(tree).items()}


def factorized(matrices: Mapping[str, Tensor], like: Mapping[str, Tensor], ranks: int) -> Tree:
    """The factors of ``ranks`` ranks whose products are nearest to some matrices (truncated SVD).

    Singular values are split evenly between A and B; where one is zero, A keeps its direction, so
    that the rank can still learn.

    Args:
        matrices: module -> ``[out, in]``.
        like: an adapter that has the names of these modules' factors.
        ranks: how many.
    """
    import torch

    found: Tree = {}
    for name, (a, b) in pairs(like).items():
        u, s, v = torch.linalg.svd(matrices[name].double(), full_matrices=False)
        u, s, v = u[:, :ranks], s[:ranks], v[:ranks]
        scale = s.clamp(min=1e-6 * float(s[0])).sqrt() if s[0] > 0 else torch.ones_like(s)
        found |= pad({a: scale[:, None] * v, b: u * (s / scale)}, 0, ranks - len(s))
    return {n: found[n].to(t.dtype).contiguous() for n, t in like.items()}


class Mean:
    """A weighted mean that folds one tree at a time; memory does not grow with their number."""

    def __init__(self) -> None:
        self.total = 0.0
        self._sum: Tree = {}

    def add(self, tree: Mapping[str, Tensor], weight: float) -> None:
        """Folds one upload in.

        Raises:
            ValueError: the names differ from those folded before, or the weight is not positive.
        """
        if weight <= 0:
            raise ValueError(f"a weight must be positive, got {weight}")
        if self.total and tree.keys() != self._sum.keys():
            odd = sorted(tree.keys() ^ self._sum.keys())[:3]
            raise ValueError(f"uploads differ in their tensors, for example {odd}")
        if self._sum:
            import torch

            tensors = [wide(tree[name]) for name in self._sum]
            torch._foreach_add_(list(self._sum.values()), tensors, alpha=weight)
        else:
            self._sum = {name: wide(tensor) * weight for name, tensor in tree.items()}
        self.total += weight

    def tree(self) -> Tree:
        """The mean of what was folded; empty if nothing was."""
        return {n: t / self.total for n, t in self._sum.items()}


def wide(tensor: Tensor) -> Tensor:
    """What sums are made of: single precision at least."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def digest(tree: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and values: equal trees, equal digests."""
    import torch

    h = hashlib.blake2b(digest_size=16)
    for name in sorted(tree):
        tensor = tree[name].detach().cpu().contiguous()
        h.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        h.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def saved_bytes(tree: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors as a safetensors file; none where there is nothing to save."""
    form = tuple((name, tree[name].dtype, tree[name].shape) for name in sorted(tree))
    return _saved_bytes(form) if form else 0


@lru_cache
def _saved_bytes(form: tuple[tuple[str, dtype, Size], ...]) -> int:
    """Of any tensors of this form: the values do not matter, and messages are often alike."""
    import torch
    from safetensors.torch import save

    return len(save({name: torch.empty(shape, dtype=kind) for name, kind, shape in form}))


def nbytes(trees: Iterable[Mapping[str, Tensor]]) -> int:
    """Bytes of the tensors themselves."""
    return sum(t.numel() * t.element_size() for tree in trees for t in tree.values())

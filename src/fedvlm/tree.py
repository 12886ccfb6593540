"""Algebra on adapters: flat ``{name: tensor}`` dicts with PEFT's own key names.

A name such as ``base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_A.weight`` holds
the module and the factor. ``lora_A`` is ``[rank, in]``, ``lora_B`` is ``[out, rank]``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

from fedvlm.errors import FedVLMError

if TYPE_CHECKING:
    from torch import Size, Tensor, dtype

Tree = dict[str, "Tensor"]
Select = Callable[[str], bool]
Described = tuple[tuple[str, ...], tuple["Size", ...], tuple["dtype", ...]]
"""Names, shapes and types of a tree's tensors."""

SMALL = 2**12  # elements of a tensor for which an operation takes less time than its call
LONG = 2**16  # elements of a vector whose norm is exact to 1e-6 in single precision
HEAD = 2**22  # bytes of the longest head of a received file: about 30,000 tensors


@cache
def factor(name: str) -> Literal["A", "B"]:
    """The LoRA factor of a tensor.

    Raises:
        ValueError: the name holds neither ``lora_A`` nor ``lora_B``.
    """
    for part in name.split("."):
        if part in ("lora_A", "lora_embedding_A"):
            return "A"
        if part in ("lora_B", "lora_embedding_B"):
            return "B"
    raise ValueError(f"'{name}' is no LoRA factor: expected lora_A or lora_B in the name")


@cache
def module(name: str) -> str:
    """The name of the adapted module, without PEFT's prefix and the factor."""
    return name.removeprefix("base_model.model.").split(".lora_", 1)[0]


def split(tree: Mapping[str, Tensor], select: Select) -> tuple[Tree, Tree]:
    """The tensors whose names ``select`` accepts, and the other tensors."""
    yes = {n: t for n, t in tree.items() if select(n)}
    return yes, {n: t for n, t in tree.items() if n not in yes}


def step(start: Mapping[str, Tensor], end: Mapping[str, Tensor], rate: float) -> Tree:
    """``start + rate * (end - start)``; exactly ``end`` where ``rate`` is 1."""
    if rate == 1.0:
        return dict(end)
    return {n: t + rate * (end[n] - t) for n, t in start.items()}


def change(down: Mapping[str, Tensor], up: Mapping[str, Tensor]) -> Tree:
    """``up - down`` for tensors of equal name and shape; other tensors of ``up`` unchanged."""
    both = {n for n, t in up.items() if n in down and down[n].shape == t.shape}
    return {n: t - down[n] if n in both else t for n, t in up.items()}


def named(prefix: str, tree: Mapping[str, Tensor]) -> Tree:
    """The tensors renamed to ``prefix/name``, so they can travel beside factors of these names."""
    return dict(zip(_named(prefix, tuple(tree)), tree.values(), strict=True))


@lru_cache(256)
def _named(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}/{name}" for name in names)


def part(tree: Mapping[str, Tensor], prefix: str) -> Tree:
    """The tensors that :func:`named` put under the prefix, with their former names."""
    return {short: tree[name] for name, short in _under(tuple(tree), f"{prefix}/")}


@lru_cache(256)
def _under(names: tuple[str, ...], head: str) -> tuple[tuple[str, str], ...]:
    """The names that begin with the head, and their rests; trees often share their names."""
    return tuple((name, name.removeprefix(head)) for name in names if name.startswith(head))


def outside(tree: Mapping[str, Tensor], head: str) -> Tree:
    """The tensors whose names do not begin with the head."""
    return {name: tree[name] for name in _others(tuple(tree), head)}


@lru_cache(256)
def _others(names: tuple[str, ...], head: str) -> tuple[str, ...]:
    return tuple(name for name in names if not name.startswith(head))


def plain(tree: Mapping[str, Tensor]) -> Tree:
    """The factors, without the tensors that :func:`named` put beside them."""
    return {name: tree[name] for name in _plain(tuple(tree))}


@lru_cache(256)
def _plain(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if "/" not in name)


def silent(tree: Mapping[str, Tensor]) -> bool:
    """Whether the adapter changes nothing, because every B is zero."""
    return not any(t.any() for n, t in tree.items() if factor(n) == "B")


def number(value: int) -> Tensor:
    """A whole number as a tensor, such as a rank or a choice beside an adapter."""
    import torch

    return torch.tensor(value)


def cut(tree: Mapping[str, Tensor], first: int, last: int) -> Tree:
    """The ranks from ``first`` to ``last``, ``last`` excluded: rows of A, columns of B."""
    import torch

    whole = torch.contiguous_format
    parts = {n: (t.mT if factor(n) == "A" else t)[..., first:last] for n, t in tree.items()}
    return {
        n: (t.mT if factor(n) == "A" else t).clone(memory_format=whole) for n, t in parts.items()
    }


def pad(tree: Mapping[str, Tensor], before: int, after: int) -> Tree:
    """The tree with ``before`` zero ranks in front of its ranks and ``after`` behind them."""
    from torch.nn.functional import pad as padded

    sides = {"A": (0, 0, before, after), "B": (before, after)}
    return {n: padded(t, sides[factor(n)]) for n, t in tree.items()}


def rank(tree: Mapping[str, Tensor]) -> int:
    """The rank of an adapter."""
    name, tensor = next(iter(tree.items()))
    return tensor.shape[-2 if factor(name) == "A" else -1]


def mask(name: str, tensor: Tensor, first: int, last: int) -> Tensor:
    """True at the ranks from ``first`` to ``last``, ``last`` excluded. Broadcasts to the factor."""
    import torch

    ranks = torch.arange(rank({name: tensor}), device=tensor.device)
    inside = (ranks >= first) & (ranks < last)
    return inside[:, None] if factor(name) == "A" else inside


def pairs(tree: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Module -> names of its A and its B."""
    found = {module(n): n for n in tree if factor(n) == "A"}
    return {m: (a, a.replace(".lora_A.", ".lora_B.")) for m, a in found.items()}


def products(tree: Mapping[str, Tensor]) -> Tree:
    """Module -> the product B A, ``[out, in]``: the change of the weight divided by the scaling."""
    return {m: tree[b] @ tree[a] for m, (a, b) in pairs(tree).items()}


def factorized(matrices: Mapping[str, Tensor], like: Mapping[str, Tensor], ranks: int) -> Tree:
    """The factors of a given rank whose products are nearest to some matrices (truncated SVD).

    Singular values are split evenly between A and B. Where a singular value is zero, A keeps its
    direction, so the rank can still learn.

    Args:
        matrices: module -> matrix ``[out, in]``.
        like: an adapter with the names and types of the factors.
        ranks: the rank.
    """
    import torch

    found: Tree = {}
    for name, (a, b) in pairs(like).items():
        u, s, v = torch.linalg.svd(matrices[name].double(), full_matrices=False)
        u, s, v = u[:, :ranks], s[:ranks], v[:ranks]
        scale = s.clamp(min=1e-6 * float(s[0])).sqrt() if s[0] > 0 else torch.ones_like(s)
        found |= pad({a: scale[:, None] * v, b: u * (s / scale)}, 0, ranks - len(s))
    return {n: found[n].to(t.dtype).contiguous() for n, t in like.items()}


def described(tree: Mapping[str, Tensor]) -> Described:
    """Names, shapes and types of the tensors, in their order: a key for trees of one form."""
    tensors = tree.values()
    return tuple(tree), tuple([t.shape for t in tensors]), tuple([t.dtype for t in tensors])


def grouped(tree: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of tensors that make one vector: small ones of a type, up to :data:`LONG`."""
    found: list[list[str]] = []
    open_: dict[dtype, tuple[list[str], int]] = {}  # the vector of a type, and its elements so far
    for name, tensor in tree.items():
        size, kind = tensor.numel(), tensor.dtype
        names, taken = open_.get(kind, ([], LONG))
        if size > SMALL or taken + size > LONG:
            found.append(names := [])
            taken = 0
        names.append(name)
        if size <= SMALL:
            open_[kind] = names, taken + size
    return found


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The elements of some tensors, one after another; a view of a single tensor."""
    from torch._utils import _flatten_dense_tensors

    return tensors[0].reshape(-1) if len(tensors) == 1 else _flatten_dense_tensors(tensors)


class Mean:
    """A weighted mean that folds one tree at a time. Its memory does not grow with their number."""

    def __init__(self) -> None:
        self.total = 0.0
        self._shapes: dict[str, Size] = {}
        self._groups: list[list[str]] = []
        self._sum: list[Tensor] = []  # a vector for each group

    def add(self, tree: Mapping[str, Tensor], weight: float) -> None:
        """Folds one upload into the mean.

        Raises:
            ValueError: names or shapes differ from earlier uploads, or the weight is not positive.
        """
        import torch

        if weight <= 0:
            raise ValueError(f"a weight must be positive, got {weight}")
        if not self.total:
            self._shapes = {name: tensor.shape for name, tensor in tree.items()}
            self._groups = grouped(tree)
        elif tree.keys() != self._shapes.keys():
            odd = sorted(tree.keys() ^ self._shapes.keys())[:3]
            raise ValueError(f"uploads differ in their tensors, for example {odd}")
        elif odd := [name for name, shape in self._shapes.items() if tree[name].shape != shape]:
            raise ValueError(
                f"uploads differ in the shapes of their tensors, for example {odd[:3]}"
            )
        found = [wide(joined([tree[name] for name in names])) for names in self._groups]
        if not self.total:
            self._sum = [vector * weight for vector in found]
        elif found:
            torch._foreach_add_(self._sum, found, alpha=weight)
        self.total += weight

    def tree(self) -> Tree:
        """The mean of the folded trees; empty before the first one."""
        found: Tree = {}
        for names, vector in zip(self._groups, self._sum, strict=True):
            shapes = [self._shapes[name] for name in names]
            parts = (vector / self.total).split([shape.numel() for shape in shapes])
            found |= {n: t.view(s) for n, t, s in zip(names, parts, shapes, strict=True)}
        return {name: found[name] for name in self._shapes}


def wide(tensor: Tensor) -> Tensor:
    """The tensor in single precision or higher, for use in sums."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def digest(tree: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, types and values. Equal trees have equal digests."""
    import torch

    h = hashlib.blake2b(digest_size=16)
    for name in sorted(tree):
        tensor = tree[name].detach().cpu().contiguous()
        h.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        h.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def read(blob: bytes | bytearray) -> Tree:
    """The tensors of a received message, a safetensors file. The sender may lie.

    The head of such a file is JSON, and its parsed form takes 20 times its bytes in memory
    (measured). So a long head is refused before it is parsed.

    Args:
        blob: the file; empty for a message without tensors.

    Raises:
        FedVLMError: the head is longer than :data:`HEAD`, or the bytes are no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not blob:
        return {}
    length = int.from_bytes(blob[:8], "little")
    if HEAD < length <= len(blob) - 8:
        raise FedVLMError(
            f"its message has a head of {length} bytes (safetensors), and {HEAD} are the most"
        )
    try:
        return load(bytes(blob))
    except SafetensorError as error:
        raise FedVLMError(f"its message is no safetensors file: {error}") from None


def saved_bytes(tree: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors as a safetensors file; 0 for an empty tree."""
    return _saved_bytes(described(tree)) if tree else 0


@lru_cache
def _saved_bytes(form: Described) -> int:
    """Bytes of a file with tensors of this form. Messages often share a form, so it is cached."""
    import torch
    from safetensors.torch import save

    made = (torch.empty(shape, dtype=kind) for shape, kind in zip(*form[1:], strict=True))
    return len(save(dict(zip(form[0], made, strict=True))))


def nbytes(trees: Iterable[Mapping[str, Tensor]]) -> int:
    """Bytes of the tensors in memory."""
    return sum(t.numel() * t.element_size() for tree in trees for t in tree.values())

"""Attacks on texts: which tokens does an upload fit?

**First layer** (the span check of DAGER, arXiv 2405.15586). The first attention layer of the
language model reads ``x(v)``, the normed embedding of the token ``v``. The server knows it for the
whole vocabulary. Gradients of a factor ``A [rank, in]`` are sums of multiples of the ``x`` of the
batch's tokens. The rows of gradients of ``B [out, rank]`` are sums of multiples of their ``A x``.
So the rows of a change lie in the span of these vectors. They fill this span, and tell the tokens
inside from those outside, if there are more rows than vectors. The image tokens count as well.

**Last layer**. The gradient of the last layer's output at an answer's token is a sum of output
embeddings: the tokens that the model expected, minus the right token. Only the answer's tokens
have such gradients, and an answer is short. So the columns of the change of ``B`` lie in the span
of few vectors, and the right tokens are near that span.

The *misfit* of a token is the part of its vector outside the span: from 0 (inside) to 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from _inversion.uploads import Observed
from fedvlm.batches.collate import Collator
from fedvlm.tree import Tree, factor, module

INSIDE = 0.05  # the largest misfit of a token that the server takes for one of the site's
ROUNDING = 2.0**-22  # of a factor, over its largest number: four units in the last place
ENDS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Found:
    """The result of an attack on the tokens of one site.

    Attributes:
        secret: the number of different tokens that the site's texts have beyond the template.
        exact: the number of tokens that the server takes for the site's, because they fit.
        right: how many of these are the site's.
        best: the share of the site's tokens that are among as many tokens that fit best. The server
            knows the tokens that occur in other rows, and chooses from these.
        frequent: the same share for a guess: the most frequent tokens of other rows.
    """

    secret: int
    exact: int
    right: int
    best: float
    frequent: float


class Words:
    """The vocabulary of a model, as the server sees it, and the texts of rows.

    Args:
        model: a PEFT model of an Idefics3 model, whose layers may be stacked.
        collator: encodes the rows.
        known: rows that belong to no site; they give the frequencies of tokens.
    """

    def __init__(self, model: Any, collator: Collator, known: Iterable[int]):
        text = model.get_base_model().model.text_model
        self.collator, self.layers = collator, len(text.layers)
        with torch.no_grad():
            table = text.embed_tokens.weight.float()
            self.first = text.layers[0].input_layernorm(table)  # [vocabulary, width]
            output = model.get_output_embeddings().weight.float()
            self.last = (output - output.mean(0)) * text.norm.weight
        prompter = collator.prompter
        picture = collator.pictures.open(collator.rows[0]["image"])
        self.template = {*prompter.prompt(picture, "").ids.tolist(), prompter.end}
        self.counts = {part: Counter[int]() for part in ("text", "answer")}
        for row in known:
            for part, count in self.counts.items():
                count.update(self.tokens([row], part))

    def tokens(self, rows: Iterable[int], part: str) -> set[int]:
        """The different tokens of the rows' questions and answers, or of the answers alone."""
        found: set[int] = set()
        for row in rows:
            encoded = self.collator.features(int(row))
            found |= set(encoded.answers[0].tolist())
            found |= set(encoded.prompt.tolist()) if part == "text" else set()
        return found - self.template

    def attack(self, observed: Observed, part: str) -> Found:
        """Attacks one upload: ``text`` by the first layer, ``answer`` by the last layer."""
        misfit, sharp = (self.at_first if part == "text" else self.at_last)(observed)
        misfit[list(self.template)] = torch.inf
        secret = self.tokens(observed.rows, part)
        exact = set((misfit < INSIDE).nonzero().flatten().tolist()) if sharp else set()
        best = set(self._fitting(misfit, part)[: len(secret)])
        guess = {token for token, _ in self.counts[part].most_common(len(secret))}
        shares = (len(tokens & secret) / len(secret) for tokens in (best, guess))
        return Found(len(secret), len(exact), len(exact & secret), *shares)

    def named(self, observed: Observed, part: str, most: int) -> list[str]:
        """The tokens that fit best, as text."""
        misfit, _ = (self.at_first if part == "text" else self.at_last)(observed)
        return [self.collator.tokenizer.decode([t]) for t in self._fitting(misfit, part)[:most]]

    def _fitting(self, misfit: Tensor, part: str) -> list[int]:
        """The tokens that occur in other rows, the best-fitting one first."""
        return sorted(self.counts[part], key=lambda token: float(misfit[token]))

    def at_first(self, observed: Observed) -> tuple[Tensor, bool]:
        """The misfit of every token at the first layer, and whether tokens outside can be told."""
        begin, changes = observed.begin, _first_layer(observed.moved)
        wide = {n: t for n, t in changes.items() if factor(n) == "A" and t.abs().max() > 0}
        checks = []
        if wide:
            rounding = max(_rounding(begin[n]) for n in wide)
            checks.append(_outside(torch.cat(list(wide.values())), self.first, rounding))
        for name, moved in changes.items():
            if factor(name) == "B" and moved.abs().max() > 0:
                a = begin[name.replace("lora_B", "lora_A")]
                checks.append(_outside(moved, self.first @ a.T, _rounding(begin[name] + moved)))
        return _joined(checks, len(self.first))

    def at_last(self, observed: Observed) -> tuple[Tensor, bool]:
        """The misfit of every token at the last layer. Right tokens are near the span only."""
        end = f"text_model.layers.{self.layers - 1}.mlp.down_proj.lora_B.weight"
        names = [n for n in observed.moved if n.endswith(end)]
        checks = [
            _outside(observed.moved[n].T, self.last, _rounding(observed.begin[n])) for n in names
        ]
        return _joined(checks, len(self.last))[0], False


def _first_layer(tree: Tree) -> Tree:
    """The factors that read the tokens' embeddings."""
    part = "text_model.layers.0.self_attn."
    return {n: t for n, t in tree.items() if part in n and module(n).endswith(ENDS)}


def _rounding(factor_: Tensor) -> float:
    """The error of a change that is the difference of two float32 numbers."""
    return float(ROUNDING * factor_.abs().max())


def _outside(rows: Tensor, vectors: Tensor, rounding: float) -> tuple[Tensor, bool]:
    """The misfit of each vector for the span of some rows.

    Args:
        rows: a change ``[rows, width]``.
        vectors: one a token ``[vocabulary, width]``.
        rounding: the error of each number of the change.

    Returns:
        The misfits, and whether they can tell: the span is smaller than the whole space, and than
        the number of rows. Otherwise the misfit is that for the stronger half of the directions.
    """
    _, s, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    size = int((s > max(rounding * max(rows.shape) ** 0.5, 1e-6 * float(s[0]))).sum())
    sharp = 0 < size < len(s)
    size = size if sharp else max(1, len(s) // 2)
    inside = (normalize(vectors.double(), dim=1) @ directions[:size].T).square().sum(1)
    return (1 - inside).clamp(min=0).sqrt().float(), sharp


def _joined(checks: Sequence[tuple[Tensor, bool]], tokens: int) -> tuple[Tensor, bool]:
    """The mean of the misfits that can tell tokens apart; of all, where none of them can."""
    sharp = [misfit for misfit, tells in checks if tells]
    chosen = sharp or [misfit for misfit, _ in checks]
    if not chosen:
        return torch.ones(tokens), False
    return torch.stack(chosen).square().mean(0).sqrt(), bool(sharp)


def mean(found: Sequence[Found]) -> Mapping[str, float]:
    """Precision and recall of the tokens that fit, over all sites, and the mean shares."""
    exact, right = sum(f.exact for f in found), sum(f.right for f in found)
    return {
        "secret": sum(f.secret for f in found) / len(found),
        "precision": right / exact if exact else float("nan"),
        "recall": right / sum(f.secret for f in found),
        "best": sum(f.best for f in found) / len(found),
        "frequent": sum(f.frequent for f in found) / len(found),
    }

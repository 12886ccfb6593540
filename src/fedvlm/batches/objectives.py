"""Training objectives, with the loss of every example.

* Supervised fine-tuning (SFT): cross-entropy on the answer's tokens only.
* Direct preference optimization (DPO, Rafailov et al., arXiv 2305.18290) on chosen and rejected
  answers. The reference is the same model with its adapter off: no second model in memory. Losses:
  ``sigmoid``, with label smoothing as in conservative DPO (Mitchell 2023), and ``ipo`` (Azar et
  al., arXiv 2310.12036), with log-ratios averaged over the tokens, as its authors compute them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedvlm.tree import wide

if TYPE_CHECKING:
    from fedvlm.batches.prompts import Features
    from fedvlm.settings.sections import ObjectiveConfig

IGNORE = -100
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Terms:
    """The loss terms of a batch's examples; training minimises ``loss.sum() / weight.sum()``.

    Attributes:
        loss: the loss summed over an example's tokens (SFT), or the pair's loss (DPO)
            ``[examples]``.
        weight: number of answer tokens (SFT) or 1 (DPO) ``[examples]``.
        doubt: the probability that the right answer does not get ``[examples]``: summed over the
            tokens, each after the correct tokens before it (SFT), or that of preferring the
            rejected answer of a pair (DPO).
        lead: the number of answer tokens before the first that is not the most probable one, each
            after the correct tokens before it ``[examples]``; None while gradients are computed.
        metrics: further scores ``[examples]``, such as the reward margin.
    """

    loss: Tensor
    weight: Tensor
    doubt: Tensor
    lead: Tensor | None
    metrics: dict[str, Tensor]

    def mean(self) -> Tensor:
        """The batch's loss."""
        return self.loss.sum() / self.weight.sum()

    def rows(self) -> list[dict[str, float]]:
        """The mean loss, the metrics and the weight of each example."""
        columns = {"loss": self.loss / self.weight, **self.metrics, "weight": self.weight}
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in values]


@dataclass(frozen=True)
class Objective:
    """A training objective.

    Attributes:
        pairs: whether batches also hold rejected answers, see :meth:`Collator.training`.
        terms: ``(peft model, batch) -> Terms``.
        weight: ``(features of a row) -> its weight`` in a batch's mean. It equals the weight that
            ``terms`` gives the row, but needs no forward pass, so that a batch may be split.
    """

    pairs: bool
    terms: Callable[[Any, Batch], Terms]
    weight: Callable[[Features], int]


def build(config: ObjectiveConfig) -> Objective:
    """The objective that a config names."""
    return OBJECTIVES[config.name](config)


def sft_terms(model: Any, batch: Batch) -> Terms:
    """Negative log-likelihood of the answers, in nats per token."""
    return Terms(*_scored(model, batch), {})


def dpo_terms(model: Any, batch: Batch, *, kind: str, beta: float, smoothing: float) -> Terms:
    """The DPO loss of every pair.

    Args:
        model: a ``PeftModel``.
        batch: all chosen answers, then all rejected answers ``[2 * examples, ...]``.
        kind: ``sigmoid`` or ``ipo``.
        beta: inverse temperature of the reward ``beta * log(policy / reference)``; IPO's tau.
        smoothing: probability that a preference label is flipped.
    """
    nll, tokens, _, lead = _scored(model, batch)
    with torch.no_grad(), adapter_off(model):
        reference, *_ = answer_nll(model, batch)
    chosen, rejected = (reference - nll).chunk(2)  # log(policy / reference) of the answers
    if kind == "ipo":
        chosen_tokens, rejected_tokens = tokens.chunk(2)
        gap = chosen / chosen_tokens - rejected / rejected_tokens
        loss = (gap - 1 / (2 * beta)) ** 2
    else:
        gap = beta * (chosen - rejected)
        loss = -(1 - smoothing) * F.logsigmoid(gap) - smoothing * F.logsigmoid(-gap)
    margin = (beta * (chosen - rejected)).detach()
    right = (margin > 0).float() + 0.5 * (margin == 0).float()  # a tie, as before training: 0.5
    metrics = {"reward_accuracy": right, "reward_margin": margin}
    lead = None if lead is None else lead.chunk(2)[0]
    return Terms(loss, torch.ones_like(loss), torch.sigmoid(-margin), lead, metrics)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Turns the adapter off. PEFT's ``disable_adapter`` also changes what is trainable."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


OBJECTIVES: dict[str, Callable[[ObjectiveConfig], Objective]] = {
    "sft": lambda c: Objective(False, sft_terms, lambda row: len(row.answers[0])),
    "dpo": lambda c: Objective(
        True,
        partial(dpo_terms, kind=c.loss, beta=c.beta, smoothing=c.label_smoothing),
        lambda row: 1,
    ),
}


def answer_nll(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihood of the answers, in nats, and the probability that they do not get.

    Args:
        model: decoder-only or encoder-decoder. A decoder-only model is called without ``labels``.
        batch: the model's inputs and ``labels`` ``[batch, tokens]``, ``-100`` where not scored.

    Returns:
        Each answer's negative log-likelihood (summed over its tokens), its number of tokens, and
        the summed probability that its tokens do not get; each ``[batch]``.
    """
    nll, tokens, doubt, _ = _scored(model, batch)
    return nll, tokens, doubt


def _scored(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The values of :func:`answer_nll`, and ``lead`` of :class:`Terms`."""
    labels = batch["labels"]
    inputs: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
    if model.config.is_encoder_decoder:
        logits = model(**inputs, labels=labels).logits
    else:
        # The prompt's logits are not needed; with a large vocabulary they take most of the memory.
        first = int((labels != IGNORE).any(0).nonzero()[0])
        labels = labels[:, first:]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        kind: Any = type(base)
        if _takes_logits_to_keep(kind):
            keep: Any = labels.shape[1] + 1
            inputs["logits_to_keep"] = keep
        if torch.is_grad_enabled():
            inputs["use_cache"] = False  # keys and values would be copied layer by layer
        # Some models (GIT) put logits of image tokens, which are not input ids, before the text's.
        logits = model(**inputs).logits[:, -labels.shape[1] - 1 : -1]
    scored = labels != IGNORE
    rows, columns = scored.nonzero(as_tuple=True)
    logits, tokens = wide(logits[rows, columns]), labels[rows, columns]
    token_nll = F.cross_entropy(logits, tokens, reduction="none")
    token_doubt = 1 - (-token_nll.detach()).exp()
    # Not `index_add`: on a GPU it sums in a different order each time.
    zeros = token_nll.new_zeros(labels.shape)
    nll, doubt = (zeros.index_put((rows, columns), t).sum(1) for t in (token_nll, token_doubt))
    if torch.is_grad_enabled():
        return nll, scored.sum(1), doubt, None
    missed = torch.zeros_like(scored).index_put((rows, columns), logits.argmax(-1) != tokens)
    lead = (scored & (missed.cumsum(1) == 0)).sum(1)
    return nll, scored.sum(1), doubt, lead


@cache
def _takes_logits_to_keep(kind: type) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]

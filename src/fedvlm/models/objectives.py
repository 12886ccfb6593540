"""Losses per example. Supervised fine-tuning (SFT): cross-entropy on the answer's tokens only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def answer_nll(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the answers, in nats.

    Args:
        model: decoder-only or encoder-decoder; called without ``labels`` where it is decoder-only.
        batch: the model's inputs and ``labels`` ``[batch, tokens]``, ``-100`` where not scored.

    Returns:
        The sum over each answer's tokens ``[batch]`` and the number of these tokens ``[batch]``.
    """
    labels = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if model.config.is_encoder_decoder:
        logits = model(**inputs, labels=labels).logits
    else:
        logits = model(**inputs).logits[:, :-1]
        labels = labels[:, 1:]
    scored = labels != IGNORE
    rows, columns = scored.nonzero(as_tuple=True)
    token_nll = F.cross_entropy(
        logits[rows, columns].float(), labels[rows, columns], reduction="none"
    )
    nll = torch.zeros(len(labels), device=token_nll.device).index_add(0, rows, token_nll)
    return nll, scored.sum(1)


def sft_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean over all answer tokens of the batch, as in transformers' own loss."""
    nll, tokens = answer_nll(model, batch)
    return nll.sum() / tokens.sum()

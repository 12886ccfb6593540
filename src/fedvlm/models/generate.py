"""Answers from the model: greedy decoding of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def greedy(model: Any, batch: dict[str, Tensor], tokenizer: Any, max_new_tokens: int) -> list[str]:
    """Generates an answer to each prompt of a left-padded batch, stripped.

    Args:
        model: the model.
        batch: from :meth:`Collator.prompts`.
        tokenizer: the model's tokenizer.
        max_new_tokens: longest answer, in tokens.
    """
    pad = tokenizer.pad_token_id
    ids = model.generate(
        **batch,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
    )
    prompt = batch["input_ids"]
    if ids.shape[1] >= prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt):
        ids = ids[:, prompt.shape[1] :]  # a decoder-only model repeats the prompt
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [t.strip() for t in texts]

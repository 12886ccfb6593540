"""Answers from the model: greedy decoding of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def greedy(model: Any, batch: dict[str, Tensor], tokenizer: Any, max_new_tokens: int) -> list[str]:
    """Decodes a left-padded batch of prompts (see :meth:`Collator.prompts`) to texts, stripped."""
    prompt = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    ids = model.generate(
        **batch,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(ids[:, prompt:], skip_special_tokens=True)
    return [t.strip() for t in texts]

"""From rows to batches: the processor's prompt, the answer's tokens, and labels on these alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedvlm.data.images import open_image
from fedvlm.models.objectives import IGNORE

CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Features:
    """One row, tokenized. ``extras`` are the other inputs, each with a leading axis of 1."""

    prompt: Tensor  # [prompt tokens]
    answer: Tensor  # [answer tokens], ends with eos
    extras: dict[str, Tensor]

    def nbytes(self) -> int:
        return sum(
            t.numel() * t.element_size() for t in (self.prompt, self.answer, *self.extras.values())
        )


class Collator:
    """Turns rows of a data set into training and generation batches for one model.

    Decoder-only models get ``prompt + answer`` in one sequence, labels masked to the answer;
    encoder-decoder models get the prompt as input and the answer as labels. Rows are encoded once
    and kept, up to 1 GiB.
    """

    def __init__(self, rows: Any, processor: Any, *, seq2seq: bool, device: torch.device):
        self.rows = rows
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.seq2seq = seq2seq
        self.device = device
        self._kept: dict[int, Features] = {}
        self._room = CACHE_BYTES

    def features(self, index: int) -> Features:
        """Row ``index``, encoded."""
        if index in self._kept:
            return self._kept[index]
        row = self.rows[int(index)]
        encoded = self._encode(open_image(row["image"]), row["question"], row["answer"])
        if encoded.nbytes() <= self._room:
            self._kept[index] = encoded
            self._room -= encoded.nbytes()
        return encoded

    def training(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """Inputs and ``labels`` ``[batch, tokens]``, right-padded."""
        batch = [self.features(i) for i in indices]
        if self.seq2seq:
            text = self._pad([f.prompt for f in batch], left=False)
            labels = [f.answer for f in batch]
        else:
            text = self._pad([torch.cat((f.prompt, f.answer)) for f in batch], left=False)
            masked = [torch.full_like(f.prompt, IGNORE) for f in batch]
            labels = [torch.cat((m, f.answer)) for m, f in zip(masked, batch, strict=True)]
        target = _stack(labels, IGNORE, left=False)
        return self._to_device({**text, **self._extras(batch), "labels": target})

    def prompts(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """Inputs for generation, left-padded."""
        batch = [self.features(i) for i in indices]
        text = self._pad([f.prompt for f in batch], left=not self.seq2seq)
        return self._to_device({**text, **self._extras(batch)})

    def prompt_text(self, question: str) -> str:
        """The question in the processor's chat template, or bare where it has none."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            turn = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(turn, add_generation_prompt=True)
        return question

    def _encode(self, image: Any, question: str, answer: str) -> Features:
        inputs = self.processor(
            text=[self.prompt_text(question)], images=[[image]], return_tensors="pt"
        )
        prompt = inputs.pop("input_ids")[0]
        inputs.pop("attention_mask", None)
        # An encoder-decoder's answer is a text of its own and may begin as its tokenizer has texts
        # begin. Not every tokenizer ends a text with eos; an answer always ends with one.
        ids = self.tokenizer(answer, add_special_tokens=self.seq2seq).input_ids
        if ids[-1:] != [self.tokenizer.eos_token_id]:
            ids = [*ids, self.tokenizer.eos_token_id]
        return Features(prompt, torch.tensor(ids), dict(inputs))

    def _pad(self, ids: Sequence[Tensor], *, left: bool) -> dict[str, Tensor]:
        ones = [torch.ones_like(t) for t in ids]
        return {
            "input_ids": _stack(ids, self.tokenizer.pad_token_id, left=left),
            "attention_mask": _stack(ones, 0, left=left),
        }

    def _extras(self, batch: Sequence[Features]) -> dict[str, Tensor]:
        return {k: torch.cat([f.extras[k] for f in batch]) for k in batch[0].extras}

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.device) for k, v in batch.items()}


def _stack(rows: Sequence[Tensor], value: int, *, left: bool) -> Tensor:
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=value, padding_side=side
    )

"""Answers that the model writes from the pass that computed the losses of expected answers.

This pass has read every prompt, and its keys and values are kept. It has also found the first token
of every answer that differs from the expected one. The model writes on from there: the prompts are
read once, tokens that the answers share with the expected ones are not decoded, and rows whose
answer has ended leave the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedvlm.batches.draw import beside
from fedvlm.models.generate import ends_of, plain

FAMILIES = {
    "gemma3": 0,
    "idefics3": 0,
    "internvl": 0,
    "llava": 0,
    "llava_next": 0,
    "llava_onevision": 0,
    "paligemma": 1,
    "qwen2_5_vl": 0,
    "qwen2_vl": 0,
    "qwen3_vl": 0,
    "smolvlm": 0,
}
"""Families that take the position of a token as an input, and the position of the first token."""
TEXTS = {
    *("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"),
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
}
"""Language models whose tokens have rotary positions: a gap between keys changes nothing."""


@dataclass
class Read:
    """What a model has read: the first forward pass of a batch.

    Attributes:
        mask: the attention mask of the batch ``[rows, tokens]``, with padding on the right.
        best: the most probable token after each of the last tokens ``[rows, some tokens]``.
        cache: the keys and values.
        shift: added to the number of earlier tokens, it gives a token's position ``[rows]``.
    """

    mask: Tensor
    best: Tensor
    cache: Any
    shift: Tensor


@contextlib.contextmanager
def reading(model: Any, most: int) -> Iterator[list[Read]]:
    """Keeps the first forward pass in this context, if the model can write on from it.

    Args:
        model: the model, with its adapter.
        most: longest answer, in tokens.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    def whole(layer: Any, tokens: int) -> bool:
        """Whether a layer keeps all keys, and masks none by its distance."""
        sliding = type(layer) is DynamicSlidingWindowLayer and tokens < layer.sliding_window
        return sliding or type(layer) is DynamicLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind, text = (c.model_type for c in (base.config, base.config.get_text_config()))
    found: list[Read] = []

    def keep(module: Any, _: Any, given: dict[str, Any], out: Any) -> None:
        cache = out.get("past_key_values")
        mask = given["attention_mask"]
        tokens = mask.shape[1] + most
        if found or cache is None or not all(whole(layer, tokens) for layer in cache.layers):
            return
        shift = mask.new_full((len(mask),), FAMILIES[kind])
        deltas = getattr(module.model, "rope_deltas", None)  # pictures take few positions
        shift = shift if deltas is None else shift + deltas.flatten().to(shift.device)
        found.append(Read(mask, out.logits.argmax(-1), cache, shift))

    if kind not in FAMILIES or text not in TEXTS or not plain(model):
        yield found
        return
    hook = base.register_forward_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def continued(
    model: Any,
    read: Read,
    answers: Sequence[Tensor],
    leads: Sequence[int],
    wanted: Sequence[int],
    most: int,
    clients: Sequence[int] = (0,),
    use: Callable[[Sequence[int], int], None] = lambda clients, rows: None,
) -> list[list[int]]:
    """The tokens of greedy answers.

    Args:
        model: the model, with its adapter.
        read: what it has read: prompts with expected answers.
        answers: the tokens of each expected answer.
        leads: the number of tokens of each before the first that is not the most probable one.
        wanted: the rows whose answers are asked for.
        most: longest answer, in tokens.
        clients: the rows are blocks of equal size, one for each client; a batch keeps this form.
        use: told the clients of the next batches, and their number of rows.
    """
    size, device, ends = len(answers) // len(clients), read.mask.device, ends_of(model)
    cache, mask = read.cache, read.mask.clone()
    lengths, before = mask.sum(1).tolist(), mask.shape[1] - read.best.shape[1]
    said: dict[int, list[int]] = {}
    for n in wanted:
        end = lengths[n] - len(answers[n]) + leads[n]  # of what the model has said so far
        mask[n, end:] = 0
        said[n] = [*answers[n][: leads[n]].tolist(), int(read.best[n, end - 1 - before])]
    place: list[int] = []  # the rows of the batch
    while left := [n for n, own in said.items() if len(own) < most and own[-1] not in ends]:
        blocks = {c: [n for n in left if n // size == k] for k, c in enumerate(clients)}
        blocks = {c: own for c, own in blocks.items() if own}
        rows = beside({c: np.array(own) for c, own in blocks.items()})[0].tolist()
        if not place or 2 * len(rows) <= len(place):
            at = torch.tensor([place.index(n) for n in rows] if place else rows, device=device)
            for layer in cache.layers:  # each on the device of its keys
                layer.batch_select_indices(at.to(layer.keys.device))
            mask, place = mask[at], rows
            use(list(blocks), len(rows))
        ahead = [lengths[n] - len(answers[n]) + len(said[n]) - 1 for n in place]
        mask = torch.cat((mask, mask.new_ones(len(place), 1)), 1)
        out = model(
            input_ids=torch.tensor([said[n][-1:] for n in place], device=device),
            attention_mask=mask,
            position_ids=(torch.tensor(ahead, device=device) + read.shift[place])[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        following = dict(zip(place, out.logits[:, -1].argmax(-1).tolist(), strict=True))
        for n in left:
            said[n].append(following[n])
    return [said[n] for n in wanted]

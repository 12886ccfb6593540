"""Answers from the model: greedy decoding of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def greedy(model: Any, batch: dict[str, Tensor], tokenizer: Any, max_new_tokens: int) -> list[str]:
    """Generates an answer to each prompt of a left-padded batch, stripped.

    Args:
        model: the model.
        batch: from :meth:`Collator.prompts`.
        tokenizer: the model's tokenizer.
        max_new_tokens: longest answer, in tokens.
    """
    return decoded(_generated(model, batch, tokenizer, max_new_tokens), tokenizer)


HARMLESS = frozenset(
    [
        "bos_token_id",
        "decoder_start_token_id",
        "eos_token_id",
        "pad_token_id",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "num_beams",
        "early_stopping",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "use_cache",
        "cache_implementation",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "_from_model_config",
        "transformers_version",
    ]
)
"""Settings of a model's generation that do not change what :func:`greedy` takes."""


def plain(model: Any) -> bool:
    """Whether greedy decoding takes the most probable token, without a penalty or the like."""
    return not model.generation_config.to_diff_dict().keys() - HARMLESS


def foretold(
    model: Any,
    answers: Sequence[Tensor],
    leads: Sequence[int],
    tokenizer: Any,
    max_new_tokens: int,
) -> list[str | None]:
    """The answers of :func:`greedy` that follow from the losses; None where it must be asked.

    If the most probable token is that of the expected answer, at each of its tokens and at its end,
    greedy decoding gives this answer.

    Args:
        model: the model. Some have settings that change the most probable token, such as a penalty
            on repetitions; then all answers are None.
        answers: the tokens of each expected answer.
        leads: the number of tokens of each before the first that is not the most probable one.
        tokenizer: the model's tokenizer.
        max_new_tokens: longest answer, in tokens.
    """
    if not plain(model):
        return [None] * len(answers)
    ends = ends_of(model)
    found: list[str | None] = []
    for ids, lead in zip(answers, leads, strict=True):
        said = ids[:max_new_tokens]
        whole = len(ids) >= max_new_tokens or int(ids[-1]) in ends
        found.append(decoded([said], tokenizer)[0] if whole and lead >= len(said) else None)
    return found


def rated(
    model: Any, batch: dict[str, Tensor], tokenizer: Any, max_new_tokens: int
) -> list[tuple[str, float]]:
    """The answers of :func:`greedy`, each with its confidence.

    The confidence is the exponential of the mean log-probability of the answer's tokens, the token
    that ends the answer included: the geometric mean of their probabilities.
    """
    steps: list[Tensor] = []  # for each token, the log-probabilities of all rows

    def recorded(ids: Tensor, scores: Tensor) -> Tensor:
        steps.append(scores.float().log_softmax(-1).amax(-1))  # greedy decoding takes the maximum
        return scores

    new = _generated(model, batch, tokenizer, max_new_tokens, (recorded,))
    logs = torch.stack(steps, 1)  # [rows, tokens]
    stops = torch.tensor(sorted(ends_of(model)), dtype=torch.long, device=new.device)
    ends = torch.isin(new[:, -logs.shape[1] :], stops).long()
    counted = ends.cumsum(1) - ends == 0  # all tokens up to the first end
    means = (logs * counted).sum(1) / counted.sum(1)
    return list(zip(decoded(new, tokenizer), means.exp().tolist(), strict=True))


@torch.no_grad()
def _generated(
    model: Any,
    batch: dict[str, Tensor],
    tokenizer: Any,
    max_new_tokens: int,
    watchers: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
) -> Tensor:
    """The tokens of the answers, ``[rows, tokens]``."""
    from transformers import LogitsProcessorList

    pad = tokenizer.pad_token_id
    ids = model.generate(
        **batch,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        logits_processor=LogitsProcessorList(watchers),
    )
    prompt = batch["input_ids"]
    if ids.shape[1] >= prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt):
        ids = ids[:, prompt.shape[1] :]  # a decoder-only model repeats the prompt
    return ids


def decoded(ids: Any, tokenizer: Any) -> list[str]:
    """The texts of rows of tokens, stripped. (A tokenizer takes an empty list for one row.)"""
    if not len(ids):
        return []
    return [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def ends_of(model: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    end = model.generation_config.eos_token_id
    return frozenset([] if end is None else end if isinstance(end, list) else [end])

"""One row as tokens: the processor's prompt, the answers' tokens, and the other inputs.

The prompt follows the processor's chat template if it has one, else the form that the family was
trained with (``PLAIN``). An answer is tokenized the way the template continues the prompt, up to
and including the token that ends a turn. Training and decoding thus see the same tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedvlm.errors import DataError
from fedvlm.models.load import Loaded

logger = logging.getLogger("fedvlm")

PLAIN = {
    "blip-2": ("Question: {} Answer:", " {}"),  # Li et al., arXiv 2301.12597
    "florence2": ("{}", "{}"),
    "git": ("{}", "{}"),
    "paligemma": ("{image}{}", "{}"),  # its processor ends the prompt with a newline
}
"""Prompt and answer of families without a chat template; ``{image}`` is the image token."""

ANSWER_TYPE = {"paligemma": 1}  # token_type_ids of answers: 1 means causal; elsewhere 0, no image


@dataclass(frozen=True)
class Features:
    """One row, tokenized.

    Attributes:
        prompt: input ids ``[prompt tokens]``.
        answers: ids of the answer, then of the rejected answer ``[answer tokens]``; each ends with
            eos.
        aligned: inputs with one value per prompt token ``[prompt tokens]``.
        extras: the other inputs, such as pixels ``[1 or patches, ...]``.
    """

    prompt: Tensor
    answers: tuple[Tensor, ...]
    aligned: dict[str, Tensor]
    extras: dict[str, Tensor]

    def nbytes(self) -> int:
        tensors = (self.prompt, *self.answers, *self.aligned.values(), *self.extras.values())
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Prompter:
    """Encodes rows for one model.

    Args:
        loaded: the model and its processor.
        max_length: most tokens of prompt and answer; None means the model's own limit.
    """

    loaded: Loaded
    max_length: int | None = None
    _cut: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        config = self.loaded.model.config
        self.processor = self.loaded.processor
        self.tokenizer = self.processor.tokenizer
        self.family = str(config.model_type)
        self.seq2seq = bool(config.is_encoder_decoder)
        self.image_id = getattr(config, "image_token_id", None)
        self.has_template = bool(getattr(self.processor, "chat_template", None))
        self.ends, self.end = _ends(self.loaded.model, self.tokenizer)
        self.limit = _limit(config, self.tokenizer)

    def encode(self, image: Any, question: str, answers: Sequence[str]) -> Features:
        """Encodes one row: its picture, question and answers.

        Raises:
            DataError: the prompt is too long or has no image token, or the processor refuses it.
        """
        text = self.prompt_text(question)
        # A template that writes the begin token itself must not get a second one.
        begin = self.tokenizer.bos_token
        bare = self.has_template and begin and text.startswith(begin)
        options = {"add_special_tokens": False} if bare else {}
        try:
            inputs = self.processor(text=[text], images=[[image]], return_tensors="pt", **options)
        except ValueError as error:  # too many or too few image tokens
            raise DataError(
                f"the processor of '{self.loaded.name}' refuses {text!r:.200}: {error}"
            ) from error
        inputs.pop("attention_mask", None)
        inputs.pop("labels", None)
        ids = inputs.pop("input_ids")[0]
        aligned = {k: inputs.pop(k)[0] for k in list(inputs) if k.endswith("token_type_ids")}
        if not self.seq2seq and not self.has_template:
            closing = {*self.ends, getattr(self.tokenizer, "sep_token_id", None)}
            while len(ids) > 1 and int(ids[-1]) in closing:  # GIT's prompt is closed by [SEP]
                ids = ids[:-1]
        aligned = {k: v[: len(ids)] for k, v in aligned.items()}
        self._check(ids)
        found = tuple(self._fit(len(ids), self.answer_ids(question, a)) for a in answers)
        return Features(ids, found, aligned, dict(inputs))

    def prompt_text(self, question: str) -> str:
        """The text of the prompt, with the place of the image."""
        if self.has_template:
            return self._render(question)
        image = str(getattr(self.processor, "image_token", None) or "")
        prompt, _ = PLAIN.get(self.family, ("{image}{}\n", "{}"))
        return prompt.replace("{image}", image).replace("{}", question)

    def answer_ids(self, question: str, answer: str) -> Tensor:
        """The answer's tokens, including the end token ``[answer tokens]``."""
        if self.seq2seq:  # a separate text, which begins as every text of this tokenizer
            ids = self.tokenizer(answer).input_ids
        elif self.has_template:
            ids = self._continuation(self._render(question), self._render(question, answer), answer)
        else:
            _, form = PLAIN.get(self.family, ("", "{}"))
            ids = self._ids(form.replace("{}", answer))
        ending = next((i for i, token in enumerate(ids) if token in self.ends), None)
        ids = [*ids, self.end] if ending is None else ids[: ending + 1]
        return torch.tensor(ids)

    def answer_type(self, name: str) -> int:
        """The value of an aligned input at the tokens of an answer."""
        return ANSWER_TYPE.get(self.family, 0) if name == "token_type_ids" else 0

    def _render(self, question: str, answer: str | None = None) -> str:
        user = [{"type": "image"}, {"type": "text", "text": question}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": user}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.processor.apply_chat_template(
            turns, add_generation_prompt=answer is None, tokenize=False
        )

    def _continuation(self, prompt: str, whole: str, answer: str) -> list[int]:
        """The tokens that follow the prompt in the whole dialogue."""
        if not whole.startswith(prompt):
            return self._ids(answer)
        asked, said = self._ids(prompt), self._ids(whole)
        if said[: len(asked)] != asked:  # a token spans the boundary: split the text instead
            asked, said = [], self._ids(whole[len(prompt) :])
        said = said[len(asked) :]
        if self.ends.isdisjoint(said):  # the template puts white space after a turn
            shorter = self._ids(whole.rstrip())[len(asked) :] if asked else self._ids(answer)
            said = shorter or said
        return said

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _check(self, prompt: Tensor) -> None:
        images = int((prompt == self.image_id).sum()) if self.image_id is not None else None
        if images == 0:
            raise DataError(
                f"the prompt of '{self.loaded.name}' has no image token, so the model would not "
                "see the image: its processor's chat template must put an image token where a turn "
                'has {"type": "image"}'
            )
        least = len(prompt) + (0 if self.seq2seq else 1)
        limit = self.max_length or self.limit
        if limit is None or least <= limit:
            return
        of_image = f", {images} of them for the image" if images else ""
        if self.limit is not None and least > self.limit:
            cure = (
                f"'{self.loaded.name}' takes at most {self.limit}: shorten the questions, set the "
                "processor to smaller images, or use another model"
            )
        else:
            cure = f"raise data.max_length to at least {least}, more for the answers"
        raise DataError(
            f"the prompt needs {len(prompt)} tokens{of_image}, but at most {limit} are allowed "
            f"(prompts are never cut): {cure}"
        )

    def _fit(self, prompt: int, answer: Tensor) -> Tensor:
        """Cuts the end off an answer that is too long."""
        limit = self.max_length or self.limit
        room = len(answer) if limit is None else limit - (0 if self.seq2seq else prompt)
        if len(answer) > room and not self._cut:
            self._cut = True
            logger.warning(
                "an answer of %d tokens was cut to %d to fit into %d tokens with its prompt; "
                "others may follow%s",
                len(answer),
                room,
                limit,
                "" if limit == self.limit else ": data.max_length allows more",
            )
        return answer[:room]


def _ends(model: Any, tokenizer: Any) -> tuple[set[int], int]:
    """All tokens that end a generation, and the one to append to an answer that lacks an end."""
    settings: Any = getattr(model, "generation_config", None)
    ids = getattr(settings, "eos_token_id", None)
    ends = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    own = tokenizer.eos_token_id
    if own is None and not ends:
        raise DataError("neither the tokenizer nor the generation config has an end token (eos)")
    end = own if own is not None and (own in ends or not ends) else ends[0]
    return {*ends, end}, end


def _limit(config: Any, tokenizer: Any) -> int | None:
    """Most tokens that the model's positions and its tokenizer allow; None if unlimited."""
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None), tokenizer.model_max_length]
    return min((int(n) for n in limits if n and n < 1_000_000), default=None)

"""One row as tokens: the processor's prompt, the answers' tokens, and the other inputs.

The pictures of a row stand in their order before its question.

The prompt follows the processor's chat template if it has one, else the form that the family was
trained with (``PLAIN``). An answer is tokenized the way the template continues the prompt, up to
and including the token that ends a turn. Training and decoding thus see the same tokens. Questions
and answers are text: a control token in them is spelled out (:mod:`fedvlm.batches.control`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedvlm.batches.control import Control
from fedvlm.batches.places import Place, Prompt, same
from fedvlm.batches.texts import Dialogue, Texts
from fedvlm.errors import DataError, FedVLMError, brief
from fedvlm.models.load import Loaded

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
        cut: number of tokens that were cut off the answers, to fit.
    """

    prompt: Tensor
    answers: tuple[Tensor, ...]
    aligned: dict[str, Tensor]
    extras: dict[str, Tensor]
    cut: int = 0

    def nbytes(self) -> int:
        tensors = (self.prompt, *self.answers, *self.aligned.values(), *self.extras.values())
        return sum(t.numel() * t.element_size() for t in tensors)


class Remembering:
    """An image processor that does not process the same picture again, if no other came between.

    Args:
        processor: the image processor.
    """

    def __init__(self, processor: Any):
        self._processor = processor
        self._last: tuple[Any, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    @property
    def names(self) -> set[str]:
        """The names of what the processor made of the last picture."""
        return set(self._last[1]) if self._last else set()

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        asked, last = (_flat(images), args, kwargs), self._last
        if not last or not _same(asked, last[0]):
            last = self._last = asked, self._processor(images, *args, **kwargs)
        return copy.copy(last[1])  # processors remove entries from it


def _flat(images: Any) -> list[Any]:
    return [i for part in images for i in _flat(part)] if isinstance(images, list) else [images]


def _same(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    """Whether two calls have the same objects as pictures, and equal settings."""
    (images, *settings), (others, *other_settings) = ours, theirs
    return list(map(id, images)) == list(map(id, others)) and settings == other_settings


@dataclass
class Prompter:
    """Encodes rows for one model.

    Args:
        loaded: the model and its processor.
        max_length: most tokens of prompt and answer; None means the model's own limit.
        new_tokens: tokens of the longest generated answer, which must fit behind every prompt.
    """

    loaded: Loaded
    max_length: int | None = None
    new_tokens: int = 1

    def __post_init__(self) -> None:
        config = self.loaded.model.config
        self.processor = self.loaded.processor
        self._once = copy.copy(self.processor)
        self._images = Remembering(self.processor.image_processor)
        self._once.image_processor = self._images
        self.tokenizer = self.processor.tokenizer
        self._texts = Texts(self.processor)
        self._place: tuple[Any, Place | None] = None, None  # a picture, and its place in a prompt
        self.places = False  # whether further questions about a picture leave the processor out
        self.family = str(config.model_type)
        self.seq2seq = bool(config.is_encoder_decoder)
        self.image_id = getattr(config, "image_token_id", None)
        self.has_template = bool(getattr(self.processor, "chat_template", None))
        self.ends, self.end = _ends(self.loaded.model, self.tokenizer)
        self.limit = _limit(config, self.tokenizer)
        if self.seq2seq and self.limit is not None and self.new_tokens > self.limit:
            raise FedVLMError(
                f"eval.max_new_tokens={self.new_tokens}: '{self.loaded.name}' generates at most "
                f"{self.limit} tokens"
            )

    @cached_property
    def control(self) -> Control:
        """The control tokens, which questions and answers may name but not use."""
        return Control(self.processor, self.loaded.model.config)

    @cached_property
    def _guarded(self) -> Prompter:
        """The prompter of texts that hide control tokens."""
        return Prompter(replace(self.loaded, processor=self.control.processor))

    def encode(self, images: Any, question: str, answers: Sequence[str]) -> Features:
        """Encodes one row: its picture or list of pictures, its question and answers.

        Raises:
            DataError: the prompt is too long or has no image token, or the processor refuses it,
                or there are several pictures and the family takes one.
        """
        prompt = self.prompt(images, question)
        tokens = self._of_images(prompt.ids)
        ids, cut = self.fitted(len(prompt.ids), question, answers, tokens)
        return Features(prompt.ids, ids, prompt.aligned, prompt.extras, cut)

    def prompt(self, images: Any, question: str) -> Prompt:
        """Encodes a picture, or a list of pictures, and a question.

        Raises:
            DataError: the processor refuses them, or the family takes one picture only.
        """
        images = images if isinstance(images, list) else [images]
        if not self.control.occurs_in(question):
            return self._placed(images, question) or self._prompt(images, question)
        ids, aligned, extras = self._guarded._prompt(images, self.control.hidden(question))
        ids, *values = self.control.shown(ids, *aligned.values())
        return Prompt(ids, dict(zip(aligned, values, strict=True)), extras)

    def _prompt(self, images: Sequence[Any], question: str) -> Prompt:
        text = self.prompt_text(question, len(images))
        self._check_places(text, len(images))
        options = {"add_special_tokens": False} if self._is_begun(text) else {}
        try:
            inputs = self._once(text=[text], images=[[*images]], return_tensors="pt", **options)
        except MemoryError:
            raise
        except Exception as error:  # each processor has its own limits on pictures and texts
            sizes = ", ".join(f"{image.width} x {image.height} pixels" for image in images)
            several = f"{len(images)} pictures" if len(images) > 1 else "a picture"
            raise DataError(
                f"the processor of '{self.loaded.name}' refuses {several} of {brief(sizes)} and "
                f"its prompt: {brief(error) or type(error).__name__}"
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
        prompt = Prompt(ids, aligned, dict(inputs))
        if self.places and len(images) == 1:
            self._place = images[0], self._learned(text, prompt)
        return prompt

    def _is_begun(self, text: str) -> bool:
        """Whether a template writes the begin token itself, which must not come twice."""
        begin = self.tokenizer.bos_token
        return bool(self.has_template and begin and text.startswith(begin))

    def _placed(self, images: Sequence[Any], question: str) -> Prompt | None:
        """A further question about a picture; None for another picture or another form of text."""
        image, place = self._place
        if not self.places or place is None or len(images) != 1 or images[0] is not image:
            return None
        return place.prompt(self._tokens(self.prompt_text(question)))

    def _learned(self, text: str, prompt: Prompt) -> Place | None:
        """The place of a picture in a prompt of the processor, if it can be filled anew."""
        if not self.has_template or not prompt.extras.keys() <= self._images.names:
            return None
        names = (getattr(self.processor, n, None) for n in ("image_token", "boi_token"))
        marks = {self.tokenizer.convert_tokens_to_ids(str(name)) for name in names if name}
        marks = (marks | {self.image_id}) - {self.tokenizer.unk_token_id}
        added = self.tokenizer.added_tokens_decoder
        return Place.learned(self._tokens(text), prompt, marks, added)

    def _tokens(self, text: str) -> list[int]:
        """The tokens of a prompt's text, with those that the tokenizer puts around it."""
        if self._is_begun(text) or not self.tokenizer.num_special_tokens_to_add():
            return self._texts.ids(text)
        return self.tokenizer(text).input_ids

    def prepare(self, rows: Iterable[tuple[str, Sequence[str]]]) -> None:
        """Renders and tokenizes the texts of rows that are encoded next, in few calls.

        Args:
            rows: the question and the answers of each row.
        """
        if self.has_template:
            plain = [row for row in rows if not self.control.occurs_in(row[0], *row[1])]
            self._texts.prepare(Dialogue(q, a) for q, answers in plain for a in (None, *answers))

    def places_hold(self, pictures: list[Any], first: str, second: str) -> bool:
        """Whether a second question about pictures has the prompt that the processor makes."""
        if self.control.occurs_in(first, second):
            return True
        with suppress(DataError):  # which the row itself will have
            self._prompt(pictures, first)
            placed = self._placed(pictures, second)
            return placed is None or same(placed, self._prompt(pictures, second))
        return True

    def _check_places(self, text: str, pictures: int) -> None:
        """Refuses several pictures where the prompt has no place for each of them.

        Some processors (BLIP-2) take all pictures nevertheless, and the model then sees one.
        """
        marks = {str(getattr(self.processor, n, None) or "") for n in ("image_token", "boi_token")}
        if pictures > 1 and all(text.count(mark) != pictures for mark in marks - {""}):
            raise DataError(
                f"there are {pictures} pictures, but the prompt of '{self.loaded.name}' (family "
                f"'{self.family}') has a place for one: use a model that takes several pictures "
                "(docs/families.md), or rows with one picture"
            )

    def answer_ids(self, question: str, answer: str) -> Tensor:
        """The answer's tokens, including the end token ``[answer tokens]``."""
        return self._ended(question, answer)[0]

    def _ended(self, question: str, answer: str) -> tuple[Tensor, int]:
        """The answer's tokens up to an end token, and how many tokens of it come later."""
        if not self.control.occurs_in(question, answer):
            ids = self._answer(question, answer)
        else:
            hidden = map(self.control.hidden, (question, answer))
            (shown,) = self.control.shown(torch.tensor(self._guarded._answer(*hidden)))
            ids = shown.tolist()
        ending = next((i for i, token in enumerate(ids) if token in self.ends), None)
        if ending is None:
            return torch.tensor([*ids, self.end]), 0
        # What follows the end is white space of a template, or the answer itself (BLIP-2's end is
        # a line break).
        lost = 0 if self.has_template else len(ids) - ending - 1
        return torch.tensor(ids[: ending + 1]), lost

    def _answer(self, question: str, answer: str) -> list[int]:
        if self.seq2seq:  # a separate text, which begins as every text of this tokenizer
            return self.tokenizer(answer).input_ids
        if self.has_template:
            asked, said = Dialogue(question), Dialogue(question, answer)
            return self._continuation(self._texts.render(asked), self._texts.render(said), answer)
        _, form = PLAIN.get(self.family, ("", "{}"))
        return self._texts.ids(form.replace("{}", answer))

    def text_length(self, question: str) -> int:
        """Number of tokens of a prompt without the picture's own."""
        if not self.control.occurs_in(question):
            return len(self._texts.ids(self.prompt_text(question)))
        guarded = self._guarded
        ids = guarded._texts.ids(guarded.prompt_text(self.control.hidden(question)))
        return len(self.control.shown(torch.tensor(ids))[0])

    def prompt_text(self, question: str, pictures: int = 1) -> str:
        """The text of the prompt, with the places of the pictures before the question."""
        if self.has_template:
            return self._texts.render(Dialogue(question, pictures=pictures))
        image = str(getattr(self.processor, "image_token", None) or "")
        prompt, _ = PLAIN.get(self.family, ("{image}{}\n", "{}"))
        return prompt.replace("{image}", image * pictures).replace("{}", question)

    def answer_type(self, name: str) -> int:
        """The value of an aligned input at the tokens of an answer."""
        return ANSWER_TYPE.get(self.family, 0) if name == "token_type_ids" else 0

    def _continuation(self, prompt: str, whole: str, answer: str) -> list[int]:
        """The tokens that follow the prompt in the whole dialogue."""
        if not whole.startswith(prompt):
            return self._texts.ids(answer)
        asked, said = self._texts.ids(prompt), self._texts.ids(whole)
        if said[: len(asked)] != asked:  # a token spans the boundary: split the text instead
            asked, said = [], self._texts.ids(whole[len(prompt) :])
        said = said[len(asked) :]
        if self.ends.isdisjoint(said):  # the template puts white space after a turn
            shorter = (
                self._texts.ids(whole.rstrip())[len(asked) :] if asked else self._texts.ids(answer)
            )
            said = shorter or said
        return said

    def _of_images(self, prompt: Tensor) -> int | None:
        """Number of image tokens in a prompt; None if the model has no such token."""
        images = int((prompt == self.image_id).sum()) if self.image_id is not None else None
        if images == 0:
            raise DataError(
                f"the prompt of '{self.loaded.name}' has no image token, so the model would not "
                "see the image: its processor's chat template must put an image token where a turn "
                'has {"type": "image"}'
            )
        return images

    def fitted(
        self, tokens: int, question: str, answers: Sequence[str], images: int | None = None
    ) -> tuple[tuple[Tensor, ...], int]:
        """The answers that fit behind a prompt, and the number of tokens that were cut off.

        Args:
            tokens: number of tokens of the prompt.
            question: the question of the prompt.
            answers: the answers.
            images: number of the prompt's tokens for the image, for the message.

        Raises:
            DataError: the prompt is too long; the message has the numbers.
        """
        self._check_length(tokens, f", {images} of them for the image" if images else "")
        limit = min(filter(None, (self.max_length, self.limit)), default=None)
        fitting, cut = [], 0
        for answer in answers:
            ids, lost = self._ended(question, answer)
            room = len(ids) if limit is None else limit - (0 if self.seq2seq else tokens)
            fitting.append(ids[:room])
            cut += lost + max(0, len(ids) - room)
        return tuple(fitting), cut

    def _check_length(self, tokens: int, of_image: str) -> None:
        own = 0 if self.seq2seq else self.new_tokens
        if self.limit is not None and tokens + own > self.limit:
            more = f" and an answer up to {own} (eval.max_new_tokens)" if own > 1 else ""
            raise DataError(
                f"the prompt needs {tokens} tokens{of_image}{more}, but '{self.loaded.name}' takes "
                f"at most {self.limit} (prompts are never cut): shorten the question, set the "
                "processor or data.max_pixels to smaller images, or use another model"
                + (", or lower eval.max_new_tokens" if more else "")
            )
        least = tokens + (0 if self.seq2seq else 1)
        if self.max_length is not None and least > self.max_length:
            raise DataError(
                f"the prompt needs {tokens} tokens{of_image}, but at most {self.max_length} are "
                f"allowed (prompts are never cut): raise data.max_length to at least {least}, "
                "more for the answers"
            )


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

"""The texts of one processor: dialogues by its chat template, and their tokens.

transformers takes far longer for a call than for a short text. So :meth:`Texts.prepare` renders and
tokenizes the texts of many rows in a few calls, and keeps them until the next rows. A text that was
not prepared has a call of its own, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

TOGETHER = 256  # most rows whose texts are prepared together


class Dialogue(NamedTuple):
    """A question about pictures, and its answer; without an answer, the prompt for one."""

    question: str
    answer: str | None = None
    pictures: int = 1


class Texts:
    """Renders and tokenizes texts.

    Args:
        processor: the processor.
    """

    def __init__(self, processor: Any):
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._prompt: tuple[Dialogue, str] | None = None  # the last prompt
        self._rendered: dict[Dialogue, str] = {}
        self._tokens: dict[str, list[int]] = {}

    def prepare(self, dialogues: Iterable[Dialogue]) -> None:
        """Renders and tokenizes dialogues, in place of those that were prepared before."""
        self._rendered, self._tokens = {}, {}
        prompts, whole = dict[Dialogue, None](), dict[Dialogue, None]()
        for dialogue in dialogues:
            (prompts if dialogue.answer is None else whole)[dialogue] = None
        with suppress(Exception):  # a text that fails does so again in a call of its own
            rendered = dict[Dialogue, str]()
            for alike in filter(None, (list(prompts), list(whole))):
                rendered |= zip(alike, self._render(alike), strict=True)
            texts = list(dict.fromkeys(rendered.values()))
            if texts:
                ids = self._tokenizer(texts, add_special_tokens=False).input_ids
                self._tokens = dict(zip(texts, ids, strict=True))
            self._rendered = rendered

    def render(self, dialogue: Dialogue) -> str:
        """A dialogue by the chat template."""
        if (found := self._rendered.get(dialogue)) is not None:
            return found
        if dialogue.answer is not None:
            return self._render([dialogue])[0]
        if self._prompt is None or self._prompt[0] != dialogue:
            self._prompt = dialogue, self._render([dialogue])[0]
        return self._prompt[1]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without those that begin and end every text."""
        found = self._tokens.get(text)
        return self._tokenizer(text, add_special_tokens=False).input_ids if found is None else found

    def _render(self, alike: Sequence[Dialogue]) -> list[str]:
        """Several dialogues, which all have an answer or all have none."""
        found: list[str] = self._processor.apply_chat_template(
            [_turns(dialogue) for dialogue in alike],
            add_generation_prompt=alike[0].answer is None,
            tokenize=False,
        )
        return found


def _turns(dialogue: Dialogue) -> list[dict[str, Any]]:
    text = {"type": "text", "text": dialogue.question}
    user = [*[{"type": "image"}] * dialogue.pictures, text]
    turns: list[dict[str, Any]] = [{"role": "user", "content": user}]
    if dialogue.answer is not None:
        said = {"type": "text", "text": dialogue.answer}
        turns.append({"role": "assistant", "content": [said]})
    return turns

"""Control tokens in the text of the data: they are text, and never act as tokens.

A question may hold ``<image>``, and an answer the token that ends a turn. A tokenizer would turn
such a text into the token itself: the model then misses a picture, or an answer ends too early.
:class:`Control` hides these texts from template, processor and tokenizer. Each one is replaced by a
stand-in, a token that a copy of the tokenizer has in addition. After tokenization, the stand-in is
replaced by the tokens of the plain text. Rows without such texts do not pass through here.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedvlm.errors import DataError

_IDS = re.compile(r"_token_(id|index)$")


class Control:
    """The control tokens of a processor, and the stand-ins for their texts.

    Args:
        processor: the processor; it is not changed.
        config: the configuration of the model, whose token ids are control tokens too.
    """

    def __init__(self, processor: Any, config: Any):
        self._processor = processor
        tokenizer = processor.tokenizer
        self.texts = sorted(_texts(processor, config), key=lambda text: (-len(text), text))
        self._ids = {int(i) for i in tokenizer.convert_tokens_to_ids(self.texts) if i is not None}
        self._ids.discard(tokenizer.unk_token_id)
        self._pattern = re.compile("|".join(map(re.escape, self.texts)))

    def occurs_in(self, *texts: str) -> bool:
        """Whether the text of a control token is in one of the texts."""
        return bool(self.texts) and any(map(self._pattern.search, texts))

    def hidden(self, text: str) -> str:
        """The text with a stand-in for each control token."""
        return self._pattern.sub(lambda found: _stand_in(self.texts.index(found[0])), text)

    @cached_property
    def processor(self) -> Any:
        """A copy of the processor, whose tokenizer knows the stand-ins."""
        from transformers import AddedToken

        processor = copy.deepcopy(self._processor)
        names = map(_stand_in, range(len(self.texts)))
        tokens = [AddedToken(name, normalized=False, special=True) for name in names]
        processor.tokenizer.add_tokens(tokens, special_tokens=True)
        return processor

    def shown(self, ids: Tensor, *aligned: Tensor) -> tuple[Tensor, ...]:
        """Replaces the stand-ins by the tokens of the plain texts.

        Args:
            ids: token ids ``[tokens]``.
            *aligned: values of the tokens ``[tokens]``; those of a stand-in are repeated.
        """
        pieces = [self._plain.get(i, [i]) for i in ids.tolist()]
        counts = torch.tensor([len(piece) for piece in pieces])
        whole = torch.tensor([i for piece in pieces for i in piece], dtype=ids.dtype)
        return whole, *(values.repeat_interleave(counts) for values in aligned)

    @cached_property
    def _plain(self) -> dict[int, list[int]]:
        """Id of a stand-in -> ids of the plain text."""
        tokenizer = self.processor.tokenizer
        names = list(map(_stand_in, range(len(self.texts))))
        ids = tokenizer.convert_tokens_to_ids(names)
        return dict(zip(ids, map(self._spelled, self.texts), strict=True))

    def _spelled(self, text: str) -> list[int]:
        """The tokens of a text, none of which is a control token.

        Raises:
            DataError: the tokenizer cannot write the text without the control token.
        """
        for pieces in ([text], list(text)):
            ids = [i for piece in pieces for i in self._bare.encode(piece).ids]
            if ids and self._ids.isdisjoint(ids):
                return ids
        raise DataError(f"this model's tokenizer cannot write '{text:.60}' as text")

    @cached_property
    def _bare(self) -> Any:
        """The tokenizer without its added tokens and without begin and end tokens."""
        backend = getattr(self._processor.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError("this model's tokenizer cannot write control tokens as text")
        described = json.loads(backend.to_str())
        return type(backend).from_str(
            json.dumps(described | {"added_tokens": [], "post_processor": None})
        )


def _stand_in(number: int) -> str:
    """A text of private characters, which no question or answer has."""
    return f"\ue0f0\ue0f1{number}\ue0f2"


def _texts(processor: Any, config: Any) -> set[str]:
    """The texts of the control tokens: special tokens, and those that the processor looks for."""
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    named = (value for name, value in vars(processor).items() if name.endswith("_token"))
    found |= {str(getattr(value, "content", value)) for value in named if value}
    ids = (v for name, v in vars(config).items() if _IDS.search(name) and isinstance(v, int))
    found |= set(filter(None, tokenizer.convert_ids_to_tokens(list(_within(ids, tokenizer)))))
    # A space or a line break may end a text, but is also part of ordinary texts.
    return {text for text in found if text.strip() and len(text) > 1}


def _within(ids: Any, tokenizer: Any) -> Sequence[int]:
    return [i for i in ids if 0 <= i < len(tokenizer)]

"""Prompts of further questions about a picture, without another call of the processor.

A processor replaces the mark of a picture in a text by tokens that depend on the picture alone, and
then tokenizes the text. A tokenizer splits a text at its added tokens before all else, so the rest
of the text has the same tokens with the mark and with the picture's tokens. :meth:`Place.learned`
takes the picture's tokens from a prompt of the processor, and :meth:`Place.prompt` puts them into
the tokens of another text. :class:`fedvlm.batches.collate.Collator` compares some prompts of the
run's own rows with those of the processor first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Prompt(NamedTuple):
    """Pictures and a question as inputs of the model; see :class:`Features`."""

    ids: Tensor
    aligned: dict[str, Tensor]
    extras: dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """What a processor puts in the place of a picture's mark.

    Attributes:
        mark: the token of the mark.
        ids: the tokens of the picture ``[picture tokens]``.
        aligned: aligned input -> its values at these tokens ``[picture tokens]``.
        around: aligned input -> its value at all other tokens.
        extras: the inputs other than the text.
    """

    mark: int
    ids: Tensor
    aligned: dict[str, Tensor]
    around: dict[str, Tensor]
    extras: dict[str, Tensor]

    @classmethod
    def learned(
        cls, text: Sequence[int], prompt: Prompt, marks: Iterable[int], added: Mapping[int, Any]
    ) -> Place | None:
        """The place of the picture in a prompt.

        Args:
            text: the tokens of the prompt's text, with the mark.
            prompt: the prompt, made by the processor.
            marks: the tokens that may be the mark.
            added: the tokenizer's added tokens by their number.

        Returns:
            The place; None where the prompt differs from the text in more than one place, or where
            the tokens around the place could depend on the picture's.
        """
        found = [at for at, token in enumerate(text) if token in set(marks)]
        if len(found) != 1:
            return None
        begin, mark = found[0], text[found[0]]
        end = len(prompt.ids) - (len(text) - begin - 1)
        whole = prompt.ids.tolist()
        if begin >= end or [*text[:begin], *whole[begin:end], *text[begin + 1 :]] != whole:
            return None
        if not _splits_alike(added, mark, whole[begin], whole[end - 1]):
            return None
        around = {}
        for name, values in prompt.aligned.items():
            others = torch.cat((values[:begin], values[end:]))
            if values.shape != prompt.ids.shape or not len(others) or (others != others[0]).any():
                return None
            around[name] = others[:1].clone()
        inside = {name: values[begin:end].clone() for name, values in prompt.aligned.items()}
        return cls(mark, prompt.ids[begin:end].clone(), inside, around, prompt.extras)

    def prompt(self, text: Sequence[int]) -> Prompt | None:
        """The prompt of another text; None if the text does not have the mark once."""
        if text.count(self.mark) != 1:
            return None
        begin = text.index(self.mark)
        before, after = begin, len(text) - begin - 1
        ids = torch.cat(
            (
                torch.tensor(text[:begin], dtype=self.ids.dtype),
                self.ids,
                torch.tensor(text[begin + 1 :], dtype=self.ids.dtype),
            )
        )
        aligned = {
            name: torch.cat(
                (self.around[name].expand(before), values, self.around[name].expand(after))
            )
            for name, values in self.aligned.items()
        }
        return Prompt(ids, aligned, dict(self.extras))


def _splits_alike(added: Mapping[int, Any], mark: int, first: int, last: int) -> bool:
    """Whether a text splits at a picture's first and last token as it splits at the mark."""
    if not {mark, first, last} <= added.keys():
        return False
    left, right, place = added[first], added[last], added[mark]
    return (
        left.lstrip == place.lstrip
        and right.rstrip == place.rstrip
        and left.normalized == right.normalized == place.normalized
        and not (left.single_word or right.single_word or place.single_word)
    )


def same(ours: Prompt, theirs: Prompt) -> bool:
    """Whether two prompts are equal, bit for bit."""
    return (
        equal({"ids": ours.ids}, {"ids": theirs.ids})
        and equal(ours.aligned, theirs.aligned)
        and equal(ours.extras, theirs.extras)
    )


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether two sets of inputs have the same names and are equal, bit for bit."""
    return ours.keys() == theirs.keys() and all(
        t is theirs[name] or (t.dtype == theirs[name].dtype and torch.equal(t, theirs[name]))
        for name, t in ours.items()
    )

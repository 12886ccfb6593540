"""From rows to batches: padded prompts and answers, with labels only on the answers' tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from fedvlm.batches.ahead import Encoded, by_picture, encode_ahead, fingerprint
from fedvlm.batches.check import answers_of, check_rows, separate, warn_of_cuts
from fedvlm.batches.objectives import IGNORE
from fedvlm.batches.prompts import Features, Prompter
from fedvlm.data.fingerprint import keys_of_pictures, picture_of
from fedvlm.data.pictures import Pictures
from fedvlm.errors import DataError
from fedvlm.models.load import Loaded

CACHE_BYTES = 1 << 28
COMPARED = 8  # rows that are encoded both ways before all are encoded the faster way


class Collator:
    """Turns rows of a data set into training and generation batches for one model.

    Decoder-only models get ``prompt + answer`` in one sequence, with labels masked to the answer.
    Encoder-decoder models get the prompt as input and the answer as labels. Rows are encoded once
    and cached in memory, up to 256 MiB. :meth:`check` may keep all of them on disk.

    Args:
        rows: from :func:`fedvlm.data.sources.load_rows`.
        loaded: the model and its processor.
        max_length: most tokens of prompt and answer together; None means the model's own limit.
        new_tokens: tokens of the longest generated answer.
        pairs: whether training batches also hold the rejected answers.
        pictures: how pictures are opened; None: as by the default settings.
    """

    def __init__(
        self,
        rows: Any,
        loaded: Loaded,
        *,
        max_length: int | None = None,
        new_tokens: int = 1,
        pairs: bool = False,
        pictures: Pictures | None = None,
    ):
        self.rows = rows
        self.pictures = pictures or Pictures()
        self.prompter = Prompter(loaded, max_length, new_tokens)
        self.tokenizer = self.prompter.tokenizer
        self.seq2seq = self.prompter.seq2seq
        self.device = loaded.device
        self.dtype = loaded.model.dtype
        self.roles = ("answer", "rejected") if pairs else ("answer",)
        self._pad_id = _pad_id(self.tokenizer, self.prompter.end)
        self._kept: dict[int, Features] = {}
        self._room = CACHE_BYTES
        self._lengths: dict[int, int] = {}
        self._ahead: Encoded | None = None
        self._last: tuple[Any, list[Image]] | None = None  # the pictures that were opened last
        self._encoding = threading.Lock()  # tokenizers are not thread-safe
        self._thread = ThreadPoolExecutor(1, "collate")
        self._next: tuple[list[int], Future[dict[str, Tensor]]] | None = None

    def check(
        self, budget: int, encoded: Callable[[int, int], None], checked: Callable[[int, int], None]
    ) -> dict[int, str]:
        """Checks all rows, and warns of answers that are cut.

        Args:
            budget: most bytes on disk for encoded rows. Within the budget, all rows are encoded
                now, or read from the file of an earlier run. Otherwise each row is checked now, and
                encoded when it is needed.
            encoded: called with the number of encoded rows and of all rows.
            checked: the same, where rows are checked and not encoded.

        Returns:
            Position of a row that cannot be encoded -> the reason.
        """
        if budget:
            self._ahead = encode_ahead(
                self.rows, self._encode_many, key=self.key, budget=budget, told=encoded
            )
        if self._ahead is None:
            problems, cuts = check_rows(
                self.rows, self.prompter, self.pictures, self.roles, checked
            )
        else:
            problems = {at: why for at, why in enumerate(self._ahead.problems) if why}
            cuts = {at: cut for at, cut in enumerate(self._ahead.cuts) if cut}
        warn_of_cuts(cuts, self.rows)
        return problems

    @cached_property
    def key(self) -> str:
        """A hash of everything that determines the rows' features."""
        return fingerprint(self.rows, self.prompter, self.roles, self.pictures)

    @cached_property
    def letters(self) -> np.ndarray:
        """The number of letters of each row's answer."""
        return np.array([len(text) for text in self.rows["answer"][:]])

    def features(self, index: int) -> Features:
        """Row ``index``, encoded.

        Raises:
            DataError: the row cannot be encoded; the message names it.
        """
        with self._encoding:
            if index in self._kept:
                return self._kept[index]
            encoded = self._named(index) if self._ahead is None else self._ahead[index]
            if encoded.nbytes() <= self._room:
                self._kept[index] = encoded
                self._room -= encoded.nbytes()
            return encoded

    def length(self, index: int) -> int:
        """Number of tokens of a row's prompt and its longest answer."""
        if index not in self._lengths:
            row = self.features(index)
            self._lengths[index] = len(row.prompt) + max(map(len, row.answers))
        return self._lengths[index]

    def _named(self, index: int) -> Features:
        try:
            return self._encode(index)
        except DataError as error:
            raise DataError(f"row {self.rows[int(index)].get('row', index)}: {error}") from error

    def _encode(self, index: int) -> Features:
        row = self.rows[int(index)]
        pictures = self._open(picture_of(row), lambda: row["image"])
        return self.prompter.encode(pictures, row["question"], answers_of(row, self.roles))

    def _encode_many(self, indices: Sequence[int]) -> Iterator[Features | DataError]:
        """As :meth:`_encode`, with the texts of all rows in few calls."""
        rows = separate(self._texts[list(indices)])
        self.prompter.places = self._places_hold
        self.prompter.prepare((row["question"], answers_of(row, self.roles)) for row in rows)
        for index, row in zip(indices, rows, strict=True):
            try:
                pictures = self._pictures_at(index)
                answers = answers_of(row, self.roles)
                yield self.prompter.encode(pictures, row["question"], answers)
            except DataError as error:
                yield error

    @cached_property
    def _texts(self) -> Any:
        """The rows without their pictures."""
        return self.rows.remove_columns("image")

    @cached_property
    def _keys(self) -> list[tuple[str, ...]]:
        return keys_of_pictures(self.rows)

    @cached_property
    def _places_hold(self) -> bool:
        """Whether the processor is needed for one question about a picture alone.

        Some of the rows are encoded both ways, with the longest question among them.
        """
        order, questions = by_picture(self.rows)[0], self._texts["question"][:]
        keys = self._keys
        found = [(a, b) for a, b in pairwise(order.tolist()) if keys[a] and keys[a] == keys[b]]
        if not found:
            return False
        longest = max(found, key=lambda pair: len(questions[pair[1]]))
        chosen = [*found[:: -(-len(found) // COMPARED)], longest]
        self.prompter.places = True
        return all(
            self.prompter.places_hold(self._pictures_at(a), questions[a], questions[b])
            for a, b in chosen
        )

    def _pictures_at(self, index: int) -> list[Image]:
        return self._open(self._keys[index], lambda: self.rows[int(index)]["image"])

    def _open(self, key: tuple[str, ...], images: Callable[[], Any]) -> list[Image]:
        """A row's pictures; the last ones again if their bytes and their names are the same."""
        last = self._last
        if not key or last is None or last[0] != key:
            last = self._last = key, self.pictures.open_all(images())
        return last[1]

    def training(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """Inputs and ``labels`` ``[batch, tokens]``, right-padded.

        With pairs, the batch holds all rows with their answers, then all rows with their rejected
        answers.
        """
        indices = [int(i) for i in indices]
        begun, self._next = self._next, None
        return begun[1].result() if begun and begun[0] == indices else self._training(indices)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Builds the next batch of :meth:`training` in another thread."""
        rows = [int(i) for i in indices]
        self._next = rows, self._thread.submit(self._training, rows)

    def _training(self, indices: Sequence[int]) -> dict[str, Tensor]:
        found = [self.features(i) for i in indices]
        batch = [(f, f.answers[n]) for n in range(len(self.roles)) for f in found]
        if self.seq2seq:
            inputs = self._inputs([f for f, _ in batch], [[] for _ in batch], left=False)
            labels = [answer for _, answer in batch]
        else:
            inputs = self._inputs([f for f, _ in batch], [[a] for _, a in batch], left=False)
            prompts = torch.tensor([len(f.prompt) for f, _ in batch])[:, None]
            ids = inputs["input_ids"]
            asked = torch.arange(ids.shape[1]) < prompts
            padded = inputs["attention_mask"] == 0
            return self._to_device({**inputs, "labels": ids.masked_fill(asked | padded, IGNORE)})
        return self._to_device({**inputs, "labels": _stack(labels, IGNORE, left=False)})

    def prompts(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """Inputs for generation, left-padded."""
        found = [self.features(i) for i in indices]
        return self._to_device(self._inputs(found, [[] for _ in found], left=not self.seq2seq))

    def picture(self, index: int) -> dict[str, Tensor]:
        """One row's inputs other than the text, such as the pixels and sizes of its pictures."""
        return self._to_device(self.features(index).extras)

    def _inputs(
        self, rows: Sequence[Features], answers: Sequence[list[Tensor]], *, left: bool
    ) -> dict[str, Tensor]:
        ids = [torch.cat((f.prompt, *a)) for f, a in zip(rows, answers, strict=True)]
        inputs = {
            "input_ids": _stack(ids, self._pad_id, left=left),
            "attention_mask": _mask([len(t) for t in ids], left=left),
        }
        for name in rows[0].aligned:
            fill = self.prompter.answer_type(name)
            values = [
                torch.cat((f.aligned[name], *(torch.full_like(t, fill) for t in a)))
                for f, a in zip(rows, answers, strict=True)
            ]
            inputs[name] = _stack(values, 0, left=left)
        return inputs | {k: _join([f.extras[k] for f in rows]) for k in rows[0].extras}

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            k: v.to(self.device, self.dtype if v.is_floating_point() else None)
            for k, v in batch.items()
        }


def _pad_id(tokenizer: Any, end: int) -> int:
    return end if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _stack(rows: Sequence[Tensor], value: int, *, left: bool) -> Tensor:
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=value, padding_side=side
    )


def _mask(lengths: Sequence[int], *, left: bool) -> Tensor:
    """1 at the tokens of rows of these lengths and 0 at the padding, ``[rows, tokens]``."""
    most, counts = max(lengths), torch.tensor(lengths)[:, None]
    places = torch.arange(most)
    return (places >= most - counts if left else places < counts).long()


def _join(rows: Sequence[Tensor]) -> Tensor:
    """Concatenates along the first axis; images of different numbers of tiles are zero-padded."""
    shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in rows), strict=True)]
    if any(list(t.shape[1:]) != shape for t in rows):
        padded = [t.new_zeros((len(t), *shape)) for t in rows]
        for whole, t in zip(padded, rows, strict=True):
            whole[tuple(slice(n) for n in t.shape)] = t
        rows = padded
    return torch.cat(list(rows))

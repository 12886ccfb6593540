"""Finds the rows that a model cannot take, before anything is trained or written.

Rows that are encoded ahead are checked by that. Other rows are checked here. A processor's verdict
on the pictures of a row, and their number of tokens, depend on their sizes only, so that blank
pictures of these sizes are enough, once. The texts of all rows are tokenized.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from fedvlm import processes
from fedvlm.batches.prompts import Prompter
from fedvlm.batches.texts import TOGETHER
from fedvlm.data.fingerprint import keys_of_pictures
from fedvlm.data.pictures import Pictures
from fedvlm.errors import DataError

logger = logging.getLogger("fedvlm")

PROBE = "?"  # a question
Sizes = tuple[tuple[int, int], ...]


class Checker:
    """Checks rows without encoding their pictures.

    Args:
        prompter: the prompter of the model.
    """

    def __init__(self, prompter: Prompter):
        self.prompter = prompter
        self._known: dict[Sizes, int | DataError] = {}

    def cut(self, sizes: Sizes, question: str, answers: Sequence[str]) -> int:
        """Number of tokens that would be cut off the answers of a row.

        Args:
            sizes: width and height of each picture, in pixels.
            question: the question.
            answers: the answers.

        Raises:
            DataError: the row cannot be encoded.
        """
        if sizes not in self._known:
            self._known[sizes] = self._tokens(sizes)
        of_pictures = self._known[sizes]
        if isinstance(of_pictures, DataError):
            raise of_pictures
        tokens = of_pictures + self.prompter.text_length(question)
        return self.prompter.fitted(tokens, question, answers)[1]

    def _tokens(self, sizes: Sizes) -> int | DataError:
        """The tokens that pictures add to a prompt; an error if the processor refuses them."""
        try:
            blank = [Image.new("RGB", size) for size in sizes]
            prompt = self.prompter.encode(blank, PROBE, []).prompt
        except DataError as error:
            return error
        return len(prompt) - self.prompter.text_length(PROBE)


def check_rows(
    rows: Any,
    prompter: Prompter,
    pictures: Pictures,
    roles: Sequence[str],
    told: Callable[[int, int], None],
) -> tuple[dict[int, str], dict[int, int]]:
    """Checks all rows.

    Args:
        rows: the rows.
        prompter: the prompter of the model.
        pictures: how pictures are opened.
        roles: the columns with answers.
        told: called with the number of checked rows and of all rows.

    Returns:
        Position -> reason, for rows that cannot be encoded; position -> number of cut tokens.
    """
    problems: dict[int, str] = {}
    cuts: dict[int, int] = {}
    checker = Checker(prompter)

    keys = keys_of_pictures(rows)
    known: dict[tuple[str, ...], Sizes] = {}  # hash and names of a row's pictures -> their sizes

    def sizes(index: int) -> Sizes | DataError:
        key = keys[index]
        try:
            found = known.get(key) or opened(index)
        except DataError as error:
            return error
        if key:
            known[key] = found
        return found

    def opened(index: int) -> Sizes:
        return tuple(p.size for p in pictures.open_all(rows[index]["image"]))

    texts, some = rows.remove_columns("image"), list[dict[str, Any]]()
    with ThreadPoolExecutor(processes.cores()) as pool:
        for index, found in enumerate(pool.map(sizes, range(len(rows)))):
            if index % TOGETHER == 0:
                some = separate(texts[index : index + TOGETHER])
                prompter.prepare((row["question"], answers_of(row, roles)) for row in some)
            try:
                if isinstance(found, DataError):
                    raise found
                row = some[index % TOGETHER]
                if cut := checker.cut(found, row["question"], answers_of(row, roles)):
                    cuts[index] = cut
            except DataError as error:
                problems[index] = str(error)
            told(index + 1, len(rows))
    return problems, cuts


def separate(batch: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The rows of a batch of columns."""
    rows = zip(*batch.values(), strict=True)
    return [dict(zip(batch, values, strict=True)) for values in rows]


def answers_of(row: Mapping[str, Any], roles: Sequence[str]) -> list[str]:
    """A row's answers; rows for prediction need none."""
    return [row[role] for role in roles if row.get(role) is not None]


def warn_of_cuts(cuts: Mapping[int, int], rows: Any) -> None:
    """Logs the number of rows whose answers were cut, with the first row numbers."""
    if cuts:
        numbers = [str(rows[index].get("row", index)) for index in sorted(cuts)[:10]]
        logger.warning(
            "the answers of %d of %d rows are cut to fit behind their prompts (%d tokens in all; "
            "row %s%s): data.max_length and the model limit them",
            len(cuts),
            len(rows),
            sum(cuts.values()),
            ", ".join(numbers),
            ", ..." if len(cuts) > 10 else "",
        )

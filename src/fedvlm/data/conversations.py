"""Turns conversations about an image into rows of one question and one answer.

Two forms are read: LLaVA's (``conversations``, a list of ``{"from", "value"}``) and the chat form
(``messages``, a list of ``{"role", "content"}``; the content is text or a list of parts). The image
is in the column ``image``, or in ``images`` as a list of one.

A conversation gives one row for every answer. The first question is used as it is. A later question
follows all turns before it::

    User: What is this?
    Assistant: A dog.
    User: Which colour?

A system turn is put before the first question. ``<image>`` is removed. A question without an answer
is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from fedvlm.data.columns import SHOWN, free_name, is_scalar
from fedvlm.data.embedded import is_embedded, is_numbers
from fedvlm.settings.sections import Columns

_COLUMNS = ("conversations", "messages")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"model": "assistant", "system": "system"}
_MARKER = "<image>"
_BATCH = 64  # conversations at a time; they may hold images


def holds_conversations(columns: Iterable[str], names: Columns) -> bool:
    """Whether a source holds conversations: it has such a column, images, and no other texts."""
    have = set(columns)
    texts = {names.question, names.answer} & have
    return bool(have & set(_COLUMNS) and have & {names.image, "image", "images"} and not texts)


def flatten(
    rows: datasets.Dataset, columns: Columns
) -> tuple[datasets.Dataset, np.ndarray, dict[int, str]]:
    """Turns conversations into rows, if the source has no columns of questions and answers.

    The column ``conversation_image`` has the path of a conversation's image, or its number if the image
    is embedded; see :mod:`fedvlm.data.groups`.

    Args:
        rows: the rows of the source.
        columns: the names for the columns of images, questions and answers.

    Returns:
        The rows, the number of each row's origin in the source, and the problems. The problems are
        a dict from the number of an unusable conversation to the reason. Such a conversation gives
        one empty row.
    """
    if SHOWN in rows.column_names:
        rows = rows.rename_column(SHOWN, free_name(SHOWN, rows.column_names))
    if not holds_conversations(rows.column_names, columns):
        return rows, np.arange(len(rows)), {}
    have = rows.column_names
    column = next(name for name in _COLUMNS if name in have)
    image = next(name for name in (columns.image, "image", "images") if name in have)
    rows = rows.with_format(None)
    kind = rows.features[image]
    several = isinstance(kind, datasets.List) and not is_numbers(kind)
    inner: Any = kind.feature if several else kind
    text = datasets.Value("string")
    if isinstance(inner, datasets.Image):
        inner = datasets.Image(decode=False)
        rows = rows.cast_column(image, datasets.List(inner) if several else inner)
    kept = {n: f for n, f in rows.features.items() if n not in (column, image) and is_scalar(f)}
    made = {columns.image: inner, columns.question: text, columns.answer: text, SHOWN: text}
    record, problem = _free("record", have), _free("problem", have)
    made |= {record: datasets.Value("int64"), problem: text}
    rows = rows.select_columns([column, image, *kept])
    flat = rows.map(
        _rows_of,
        batched=True,
        with_indices=True,
        batch_size=_BATCH,
        writer_batch_size=_BATCH,
        remove_columns=rows.column_names,
        features=datasets.Features(kept | made),
        fn_kwargs={
            "column": column,
            "image": image,
            "names": columns.model_dump() | {"record": record, "problem": problem},
        },
    )
    numbers = np.asarray(flat[record][:], dtype=np.int64)
    said = zip(numbers.tolist(), flat[problem][:], strict=True)
    problems = {number: reason for number, reason in said if reason}
    return flat.remove_columns([record, problem]), numbers, problems


def _free(name: str, taken: Sequence[str]) -> str:
    """A name for a column of our own."""
    name = f"_{name}"
    while name in taken:
        name += "_"
    return name


def _rows_of(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    column: str,
    image: str,
    names: Mapping[str, str],
) -> dict[str, list[Any]]:
    """Turns a batch of conversations into rows, by columns."""
    kept = [name for name in batch if name not in (column, image)]
    out: list[dict[str, Any]] = []
    for at, number in enumerate(indices):
        shown, problem = None, ""
        pairs: list[tuple[str, str]] = []
        try:
            shown = _one_image(batch[image][at])
            pairs = list(_pairs(batch[column][at]))
        except ValueError as error:
            shown, pairs, problem = None, [("", "")], str(error)
        is_path = isinstance(shown, str) and not is_embedded(shown)
        alone = shown if is_path else f"conversation {number}"
        for question, answer in pairs:
            row = {name: batch[name][at] for name in kept}
            row[SHOWN] = alone
            row |= {names["image"]: shown, names["question"]: question, names["answer"]: answer}
            out.append(row | {names["record"]: number, names["problem"]: problem})
    return {name: [row[name] for row in out] for name in out[0]}


def _one_image(value: Any) -> Any:
    several = isinstance(value, list) and not all(type(each) is int for each in value)
    images = value if several else [value]
    images = [each for each in images if each]
    if not images:
        raise ValueError("the conversation has no image")
    if len(images) > 1:
        raise ValueError(f"the conversation has {len(images)} images, but only one can be used")
    if not isinstance(images[0], str | bytes | Mapping | list):
        raise ValueError(f"the conversation's image is {images[0]!r:.60}, not bytes or a path")
    return images[0]


def _pairs(turns: Any) -> Iterator[tuple[str, str]]:
    """Yields question and answer, for every answer of a conversation."""
    system: list[str] = []
    before: list[str] = []
    asked: list[str] = []
    answered = False
    for number, (role, text) in enumerate(_turns(turns)):
        if role == "system":
            system.append(text)
        elif role == "user":
            asked.append(text)
        elif not asked:
            raise ValueError(f"turn {number} of the conversation is an answer without a question")
        else:
            question = "\n".join(asked)
            said = [*before, f"User: {question}"] if before else [question]
            yield "\n".join([*system, *said]), text
            before += [f"User: {question}", f"Assistant: {text}"]
            asked, answered = [], True
    if not answered:
        raise ValueError("the conversation has no answer")


def _turns(turns: Any) -> Iterator[tuple[str, str]]:
    """Yields role (user, assistant or system) and text of every turn, in either form."""
    if isinstance(turns, Mapping):  # a list of structures is stored as a structure of lists
        turns = [
            dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)
        ]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"the conversation is not a list of turns: {turns!r:.60}")
    for number, turn in enumerate(turns):
        named = turn.get("role") or turn.get("from")
        if named not in _ROLES:
            raise ValueError(
                f"turn {number} of the conversation has the role {named!r}; the roles are "
                + ", ".join(_ROLES)
            )
        said = turn.get("content") if turn.get("content") is not None else turn.get("value")
        yield _ROLES[named], _text(said)


def _text(content: Any) -> str:
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
        content = "\n".join(str(part) for part in parts if part)
    return str(content or "").replace(_MARKER, "").strip()

"""Turns conversations about an image into rows of one question and one answer.

Two forms are read: LLaVA's (``conversations``, a list of ``{"from", "value"}``) and the chat form
(``messages``, a list of ``{"role", "content"}``; the content is text or a list of parts). The image
is in the column ``image``, in ``images`` as a list of one, or in a part of a message such as
``{"type": "image", "image": ...}`` or ``{"type": "image_url", "image_url": {"url": ...}}``.

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
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from fedvlm.data.columns import SHOWN, free_name, is_scalar, listed
from fedvlm.data.embedded import is_embedded, is_numbers, picture_of
from fedvlm.errors import DataError, brief
from fedvlm.settings.sections import Columns

_COLUMNS = ("conversations", "messages")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"model": "assistant", "system": "system"}
_MARKER = "<image>"
_NO_IMAGE = "the conversation has no image"
_PICTURES = ("image", "image_url", "path", "url", "bytes")
_BATCH = 64  # conversations at a time; they may hold images


def holds_conversations(columns: Iterable[str], names: Columns) -> bool:
    """Whether a source holds conversations: it has such a column, and no other texts."""
    have = set(columns)
    return bool(have & set(_COLUMNS)) and not {names.question, names.answer} & have


def flatten(
    rows: datasets.Dataset, columns: Columns, root: Path
) -> tuple[datasets.Dataset, np.ndarray, dict[int, str]]:
    """Turns conversations into rows, if the source has no columns of questions and answers.

    The column ``conversation_image`` has the path of a conversation's image, or its number if the
    image is embedded; see :mod:`fedvlm.data.groups`.

    Args:
        rows: the rows of the source.
        columns: the names for the columns of images, questions and answers.
        root: the folder of relative paths.

    Returns:
        The rows, the number of each row's origin in the source, and the problems. The problems are
        a dict from the number of an unusable conversation to the reason. Such a conversation gives
        one empty row.

    Raises:
        DataError: there is no column of images, and no conversation holds one.
    """
    if SHOWN in rows.column_names:
        rows = rows.rename_column(SHOWN, free_name(SHOWN, rows.column_names))
    if not holds_conversations(rows.column_names, columns):
        return rows, np.arange(len(rows)), {}
    have = rows.column_names
    column = next(name for name in _COLUMNS if name in have)
    image = next((name for name in (columns.image, "image", "images") if name in have), None)
    rows = rows.with_format(None)
    for name in filter(None, (column, image)):
        rows = rows.cast_column(name, _undecoded(rows.features[name]))
    kind = rows.features[image] if image else datasets.Image(decode=False)
    several = isinstance(kind, datasets.List) and not is_numbers(kind)
    inner: Any = kind.feature if several else kind
    text = datasets.Value("string")
    kept = {n: f for n, f in rows.features.items() if n not in (column, image) and is_scalar(f)}
    made = {columns.image: inner, columns.question: text, columns.answer: text, SHOWN: text}
    record, problem = _free("record", have), _free("problem", have)
    made |= {record: datasets.Value("int64"), problem: text}
    rows = rows.select_columns([column, *([image] if image else []), *kept])
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
            "root": str(root),
            "names": columns.model_dump() | {"record": record, "problem": problem},
        },
    )
    numbers = np.asarray(flat[record][:], dtype=np.int64)
    said = zip(numbers.tolist(), flat[problem][:], strict=True)
    problems = {number: reason for number, reason in said if reason}
    if not image and len(problems) == len(rows):
        raise DataError(
            f"there is no column '{brief(columns.image, 80)}' or 'images', and no conversation "
            'with a picture in a part such as {"type": "image", "image": "1.jpg"} (the first: '
            f"{brief(next(iter(problems.values())))}); its columns are {listed(have)}"
        )
    return flat.remove_columns([record, problem]), numbers, problems


def _undecoded(feature: Any) -> Any:
    """The same type, where images stay encoded."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature), length=feature.length)
    return feature


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
    image: str | None,
    root: str,
    names: Mapping[str, str],
) -> dict[str, list[Any]]:
    """Turns a batch of conversations into rows, by columns."""
    kept = [name for name in batch if name not in (column, image)]
    out: list[dict[str, Any]] = []
    for at, number in enumerate(indices):
        shown, problem = None, ""
        pairs: list[tuple[str, str]] = []
        try:
            turns = _turns_of(batch[column][at])
            found = batch[image][at] if image else list(_inside(turns))
            shown = _one_image(found)
            shown = shown if image else picture_of(shown, Path(root))
            pairs = list(_pairs(turns))
        except ValueError as error:
            shown, pairs, problem = None, [("", "")], str(error)
        path = shown.get("path") if isinstance(shown, dict) and not shown.get("bytes") else shown
        is_path = isinstance(path, str) and not is_embedded(path)
        alone = path if is_path else f"conversation {number}"
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
        raise ValueError(_NO_IMAGE)
    if len(images) > 1:
        raise ValueError(f"the conversation has {len(images)} images, but only one can be used")
    if not isinstance(images[0], str | bytes | Mapping | list):
        raise ValueError(f"the conversation's image is {images[0]!r:.60}, not bytes or a path")
    return images[0]


def _pairs(turns: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
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


def _turns_of(turns: Any) -> list[Mapping[str, Any]]:
    if isinstance(turns, Mapping):  # a list of structures is stored as a structure of lists
        turns = [
            dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)
        ]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"the conversation is not a list of turns: {turns!r:.60}")
    return turns


def _inside(turns: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """Yields the images in the parts of the turns' contents."""
    contents = (turn.get("content") for turn in turns)
    for part in (part for content in contents if isinstance(content, list) for part in content):
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            found = next((part[key] for key in _PICTURES if part.get(key)), None)
            address = found.get("url") if isinstance(found, Mapping) else None
            if found is not None:
                yield address or found


def _turns(turns: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yields role (user, assistant or system) and text of every turn, in either form."""
    for number, turn in enumerate(turns):
        named = turn.get("role") or turn.get("from")
        role = _ROLES.get(str(named).strip().lower())
        if role is None:
            raise ValueError(
                f"turn {number} of the conversation has the role {named!r:.60}; the roles are "
                + ", ".join(_ROLES)
            )
        said = turn.get("content") if turn.get("content") is not None else turn.get("value")
        yield role, _text(said)


def _text(content: Any) -> str:
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
        content = "\n".join(filter(None, map(_plain, parts)))
    return _plain(content).replace(_MARKER, "").strip()


def _plain(value: Any) -> str:
    """A text, number or flag as JSON writes it; a missing value is empty."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)

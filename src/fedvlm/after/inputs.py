"""Input of the commands after training: rows from images and files."""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from fedvlm.data import folders
from fedvlm.data.images import Checked
from fedvlm.data.pictures import Pictures
from fedvlm.data.sources import load_rows
from fedvlm.errors import DataError, brief
from fedvlm.settings.sections import DataConfig

logger = logging.getLogger("fedvlm")


def rows_to_ask(data: DataConfig, source: Any, question: str | None) -> datasets.Dataset:
    """The rows of an image, a folder or a file, with a question for each.

    Args:
        data: how to read pictures and a file of rows; its ``path`` is replaced.
        source: an image (path, bytes or PIL), a list of images that one question is about, a folder
            of images, or any data source.
        question: the question for all rows. A file of rows may have its own questions.

    Returns:
        Rows with ``image``, ``question``, ``answer`` if the source has that column, and either
        ``name`` (the image's file) or ``row`` (the number in the file of rows).

    Raises:
        DataError: the source cannot be read, or there is no question.
    """
    if question is not None:
        _check_text(question)
    path = Path(os.path.expanduser(source)) if isinstance(source, str | Path) else None
    if path is None:
        return from_images([source], _needed(question, "the image"), data)
    pictures = Pictures.of(data)
    if os.path.isfile(path) and folders.is_picture(path, pictures):
        return from_images([path], _needed(question, f"'{path}'"), data)
    if not os.path.exists(path) and folders.is_picture(path, pictures):
        raise DataError(f"there is no picture '{path}' (looked in {Path.cwd()})")
    if os.path.isdir(path) and (question is not None or not folders.has_rows(path)):
        found = folders.look_into(path, pictures)
        if found.pictures:
            asked = _needed(question, f"the {len(found.pictures)} images in '{path}'")
            found.report(path)
            return from_images(found.pictures, asked, data)
    rows = load_rows(
        data.model_copy(update={"path": str(source)}), answers=False, question=question
    )
    kept = [c for c in ("image", "question", "answer", "row") if c in rows.column_names]
    return rows.select_columns(kept)


def from_images(
    images: Sequence[Any], question: str, data: DataConfig | None = None
) -> datasets.Dataset:
    """Rows with the same question about every image.

    Args:
        images: paths, encoded bytes, PIL images, or lists of these, for rows of several pictures.
        question: the question.
        data: how to open pictures; None: the default settings.

    Raises:
        DataError: an image cannot be used; the message names it. With ``data.on_error=skip``,
            such images are left out with a warning, and only a list without any other is an error.
    """
    _check_text(question)
    if not question.strip():
        raise DataError("the question is empty; ask something, such as 'What is in the picture?'")
    data = data or DataConfig()
    pictures = Pictures.of(data)
    names = [str(i) if isinstance(i, str | Path) else f"image {k}" for k, i in enumerate(images)]
    broken: list[tuple[str, str]] = []
    notes: Counter[str] = Counter()
    rows: dict[str, list[Any]] = {"image": [], "question": [], "name": []}
    for name, image in zip(names, images, strict=True):
        try:
            encoded, done = _encoded_all(image, pictures)
        except DataError as error:
            broken.append((name, str(error)))
            continue
        notes.update(done)
        for column, value in zip(rows, (encoded, question, name), strict=True):
            rows[column].append(value)
    if broken:
        _refuse_or_report(broken, len(names), data.on_error)
    kind: Any = datasets.Image(decode=False)
    if any(isinstance(value, list) for value in rows["image"]):
        kind = datasets.List(kind)
        rows["image"] = [v if isinstance(v, list) else [v] for v in rows["image"]]
    Checked(notes=notes).report("the images")
    return datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            {
                "image": kind,
                **dict.fromkeys(("question", "name"), datasets.Value("string")),
            }
        ),
    )


def _refuse_or_report(broken: Sequence[tuple[str, str]], count: int, on_error: str) -> None:
    listed = "; ".join(
        f"'{brief(folders.shown_name(name), 150)}': {brief(why)}" for name, why in broken[:5]
    )
    listed += f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
    if on_error == "fail" or len(broken) == count:
        raise DataError(f"{len(broken)} of {count} images cannot be used: {listed}")
    logger.warning("left out %d of %d images: %s", len(broken), count, listed)


def _needed(question: str | None, what: str) -> str:
    if question is None:
        raise DataError(f"there is no question for {what}; add it, such as 'What is this?'")
    return question


def _check_text(question: Any) -> None:
    if not isinstance(question, str):
        raise DataError(f"a question is a text; got {question!r:.60}")
    if not _is_unicode(question):
        why = "half a surrogate pair, which is no character"
        raise DataError(f"the question has {why}; got {question!r:.60}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encoded_all(image: Any, pictures: Pictures) -> tuple[Any, list[str]]:
    """As :func:`_encoded`; a list of pictures gives a list of values."""
    if not isinstance(image, list | tuple):
        return _encoded(image, pictures)
    found = [_encoded(each, pictures) for each in image]
    values = [value for value, _ in found]
    pictures.open_all(values)  # the limits on the pictures of a row
    return values, [note for _, notes in found for note in notes]


def _encoded(image: Any, pictures: Pictures) -> tuple[dict[str, Any], list[str]]:
    """The value of the column ``image``, and what is done to the picture when it is opened."""
    if isinstance(image, str | Path):
        path = str(Path(os.path.expanduser(image)).absolute())
        if not _is_unicode(path):
            raise DataError("its name is not UTF-8; rename the file or its folder")
        value: dict[str, Any] = {"bytes": None, "path": path}
        return value, pictures.opened(value).notes
    if isinstance(image, bytes | bytearray | memoryview):
        value = {"bytes": bytes(image), "path": None}
        return value, pictures.opened(value).notes
    if not isinstance(image, Image.Image):
        raise DataError(f"an image is a path, encoded bytes or a PIL image; got {image!r:.60}")
    out = io.BytesIO()
    look = pictures.opened(image)
    look.image.save(out, format="PNG")
    return {"bytes": out.getvalue(), "path": None}, look.notes

"""Input of the commands after training: rows from images and files."""

from __future__ import annotations

import io
import logging
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
        source: an image (path, bytes or PIL), a folder of images, or any data source.
        question: the question for all rows. A file of rows may have its own questions.

    Returns:
        Rows with ``image``, ``question``, ``answer`` if the source has that column, and either
        ``name`` (the image's file) or ``row`` (the number in the file of rows).

    Raises:
        DataError: the source cannot be read, or there is no question.
    """
    path = Path(source).expanduser() if isinstance(source, str | Path) else None
    if path is None:
        return from_images([source], _needed(question, "the image"), data)
    pictures = Pictures.of(data)
    if path.is_file() and folders.is_picture(path, pictures):
        return from_images([path], _needed(question, f"'{path}'"), data)
    if path.is_dir() and (question is not None or not folders.has_rows(path)):
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
        images: paths, encoded bytes, or PIL images.
        question: the question.
        data: how to open pictures; None: the default settings.

    Raises:
        DataError: an image cannot be used; the message names it. With ``data.on_error=skip``,
            such images are left out with a warning, and only a list without any other is an error.
    """
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
            encoded = _encoded(image, pictures)
            notes.update(pictures.opened(encoded).notes)
        except DataError as error:
            broken.append((name, str(error)))
            continue
        for column, value in zip(rows, (encoded, question, name), strict=True):
            rows[column].append(value)
    if broken:
        _refuse_or_report(broken, len(names), data.on_error)
    Checked(notes=notes).report("the images")
    return datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            {
                "image": datasets.Image(decode=False),
                **dict.fromkeys(("question", "name"), datasets.Value("string")),
            }
        ),
    )


def _refuse_or_report(broken: Sequence[tuple[str, str]], count: int, on_error: str) -> None:
    listed = "; ".join(f"'{brief(name, 150)}': {brief(why)}" for name, why in broken[:5])
    listed += f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
    if on_error == "fail" or len(broken) == count:
        raise DataError(f"{len(broken)} of {count} images cannot be used: {listed}")
    logger.warning("left out %d of %d images: %s", len(broken), count, listed)


def _needed(question: str | None, what: str) -> str:
    if question is None:
        raise DataError(f"there is no question for {what}; add it, such as 'What is this?'")
    return question


def _encoded(image: Any, pictures: Pictures) -> dict[str, Any]:
    if isinstance(image, str | Path):
        return {"bytes": None, "path": str(Path(image).expanduser().absolute())}
    if isinstance(image, bytes | bytearray | memoryview):
        return {"bytes": bytes(image), "path": None}
    if not isinstance(image, Image.Image):
        raise DataError(f"an image is a path, encoded bytes or a PIL image; got {image!r:.60}")
    out = io.BytesIO()
    pictures.open(image).save(out, format="PNG")
    return {"bytes": out.getvalue(), "path": None}

"""Input and output of the commands after training: rows from images and files, and result files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from fedvlm.data.sources import load_rows, open_image
from fedvlm.errors import DataError, FedVLMError
from fedvlm.settings.sections import DataConfig
from fedvlm.store.files import write_bytes

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
FORMATS = (".jsonl", ".json", ".csv", ".parquet")


def rows_to_ask(data: DataConfig, source: Any, question: str | None) -> datasets.Dataset:
    """The rows of an image, a folder or a file, with a question for each.

    Args:
        data: how to read a file of rows; its ``path`` is replaced.
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
        return from_images([source], _needed(question, "the image"))
    if path.is_file() and path.suffix.lower() in IMAGES:
        return from_images([path], _needed(question, f"'{path}'"))
    if path.is_dir():
        images = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGES]
        if images and (question is not None or not _has_rows(path)):
            return from_images(images, _needed(question, f"the {len(images)} images in '{path}'"))
    rows = load_rows(
        data.model_copy(update={"path": str(source)}), answers=False, question=question
    )
    kept = [c for c in ("image", "question", "answer", "row") if c in rows.column_names]
    return rows.select_columns(kept)


def from_images(images: Sequence[Any], question: str) -> datasets.Dataset:
    """Rows with the same question about every image.

    Raises:
        DataError: an image does not decode; the message names it.
    """
    if not question.strip():
        raise DataError("the question is empty; ask something, such as 'What is in the picture?'")
    names = [str(i) if isinstance(i, str | Path) else f"image {k}" for k, i in enumerate(images)]
    broken = [
        f"'{name}': {why}" for name, why in zip(names, map(_broken, images), strict=True) if why
    ]
    if broken:
        listed = "; ".join(broken[:5])
        more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise DataError(f"{len(broken)} of {len(images)} images cannot be used: {listed}{more}")
    return datasets.Dataset.from_dict(
        {
            "image": [_encoded(image) for image in images],
            "question": [question] * len(images),
            "name": names,
        },
        features=datasets.Features(
            {
                "image": datasets.Image(decode=False),
                **dict.fromkeys(("question", "name"), datasets.Value("string")),
            }
        ),
    )


def _has_rows(folder: Path) -> bool:
    names = ("metadata.jsonl", "metadata.csv", "dataset_dict.json", "state.json")
    return any((folder / name).exists() for name in names) or any(folder.rglob("*.parquet"))


def _needed(question: str | None, what: str) -> str:
    if question is None:
        raise DataError(f"there is no question for {what}; add it, such as 'What is this?'")
    return question


def _broken(image: Any) -> str:
    """The reason why an image does not decode; empty if it does."""
    try:
        open_image(image)
    except DataError as error:
        return str(error)
    return ""


def _encoded(image: Any) -> dict[str, Any]:
    if isinstance(image, str | Path):
        return {"bytes": None, "path": str(Path(image).expanduser().absolute())}
    if isinstance(image, bytes | bytearray):
        return {"bytes": bytes(image), "path": None}
    if not hasattr(image, "save"):
        raise DataError(f"an image is a path, encoded bytes or a PIL image; got {image!r:.60}")
    out = io.BytesIO()
    image.save(out, format="PNG")
    return {"bytes": out.getvalue(), "path": None}


# -- files of answers and scores


def check_out(out: str | Path | None) -> None:
    """Refuses a file that cannot be written, before any work is done.

    Raises:
        FedVLMError: the format is not known, or ``out`` is a folder.
    """
    if out is None:
        return
    path = Path(out)
    if path.suffix.lower() not in FORMATS:
        raise FedVLMError(f"--out '{path}' must end in {', '.join(FORMATS)}")
    if path.is_dir():
        raise FedVLMError(f"--out '{path}' is a folder; give a file in it")


def write_table(rows: list[dict[str, Any]], out: str | Path) -> Path:
    """Writes rows as JSON lines, a JSON list, CSV or parquet, chosen by the file's suffix.

    The file is written atomically.

    Raises:
        FedVLMError: as :func:`check_out`, or the file cannot be written.
    """
    check_out(out)
    path = Path(out)
    suffix = path.suffix.lower()
    text = io.StringIO()
    if suffix == ".parquet":
        buffer = io.BytesIO()
        datasets.Dataset.from_list(rows).to_pandas().to_parquet(buffer, index=False)
        content = buffer.getvalue()
    elif suffix == ".csv":
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    elif suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        content = "".join(lines).encode()
    else:
        content = (json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode()
    try:
        write_bytes(path, content)
    except OSError as error:
        raise FedVLMError(f"--out '{path}' cannot be written: {error.strerror}") from error
    return path

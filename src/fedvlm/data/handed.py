"""Rows that a program hands over as an object: they become a file that every command can read.

A run is reproducible from its folder, and ``resume``, ``evaluate`` and ``predict`` read its rows
again. So the rows are written to a parquet file beside the run, once. The name of the file has the
digest of its content: the same rows are one file, and no file is ever replaced by other rows.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.table import embed_table_storage

from fedvlm.data.sources import quiet
from fedvlm.errors import DataError, shown

KINDS = "a datasets.Dataset or DatasetDict, a pandas DataFrame, or a list of dicts"
DIGITS = 12  # hexadecimal digits of the digest in a file's name


@quiet()
def kept(data: Any, folder: str | Path, split: str = "train", image: str = "image") -> Path:
    """Writes rows to ``FOLDER/rows-DIGEST.parquet``, with all pictures inside.

    Args:
        data: a ``datasets.Dataset`` or ``DatasetDict``, a pandas ``DataFrame``, or a sequence of
            mappings. A picture may be a PIL image, encoded bytes, ``{"bytes", "path"}``, or the
            path of a file, relative to the working folder. A row may have a list of pictures.
        folder: the folder of the file; it is made.
        split: the split of a ``DatasetDict``.
        image: the name of the column of pictures.

    Returns:
        The path of the file.

    Raises:
        DataError: the object is none of these, or has no rows, or columns without a type.
    """
    rows = _rows(data, split, image)
    if not len(rows):
        raise DataError("data: there are no rows in it")
    rows = _whole(rows.with_format(None), image)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".parquet", prefix=".rows-", dir=folder)
    os.close(handle)
    try:
        with quiet():
            rows.to_parquet(name)
        with open(name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]
        path = folder / f"rows-{digest}.parquet"
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def _rows(data: Any, split: str, image: str) -> datasets.Dataset:
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"data: it has no split '{split}' (data.split), but {', '.join(data)}")
        return data[split]
    if isinstance(data, datasets.Dataset):
        return data
    if isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError(
            "data: a stream has no end that a run could know; use a Dataset, such as "
            "Dataset.from_list(list(stream.take(10_000)))"
        )
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        data = data.astype(object).where(data.notna(), None).to_dict("records")  # no NaN in texts
    if not isinstance(data, Sequence) or isinstance(data, str | bytes):
        raise DataError(f"data: it must be {KINDS}, got {type(data).__name__}")
    if wrong := [row for row in data if not isinstance(row, Mapping)]:
        raise DataError(f"data: every row must be a dict, got {shown(wrong[0], 60)}")
    try:
        return datasets.Dataset.from_list(_alike([dict(row) for row in data], image))
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise DataError(f"data: the rows cannot become a table: {error}") from error


def _alike(rows: list[dict[str, Any]], image: str) -> list[dict[str, Any]]:
    """The rows; if one has a list of pictures, a single picture is a list of one."""

    def several(value: Any) -> bool:
        return isinstance(value, list | tuple) and not all(type(each) is int for each in value)

    if any(several(row.get(image)) for row in rows):
        for row in rows:
            value = row.get(image)
            row[image] = list(value) if several(value) or value == [] else [value]  # type: ignore[arg-type]
    return rows


def _whole(rows: datasets.Dataset, image: str) -> datasets.Dataset:
    """The rows with absolute paths, and with the bytes of pictures of the type ``Image``."""
    if any(map(_holds_images, rows.features.values())):
        rows = rows.with_format("arrow").map(embed_table_storage, batched=True, batch_size=64)
        rows = rows.with_format(None)
    kind = rows.features.get(image)
    kind = kind.feature if isinstance(kind, datasets.List) else kind
    if isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string"):
        rows = rows.map(_absolute, input_columns=[image], fn_kwargs={"image": image})
    return rows


def _holds_images(kind: Any) -> bool:
    inner = kind.feature if isinstance(kind, datasets.List) else kind
    return isinstance(inner, datasets.Image)


def _absolute(value: Any, image: str) -> dict[str, Any]:
    """Paths of existing files as absolute paths; any other text as it is."""
    several = isinstance(value, list)
    return {image: [_path(each) for each in value] if several else _path(value)}


def _path(text: str | None) -> str | None:
    there = bool(text) and len(str(text)) < 4096 and os.path.isfile(str(text))
    return os.path.abspath(str(text)) if there else text

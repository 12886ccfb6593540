"""Pictures that are embedded as text or as numbers become bytes.

These are base64 texts, ``data:image/…;base64,`` URIs, and lists of the numbers 0 to 255. A text
counts as base64 if it decodes and begins like a picture; any other text is a path. A row may have a
list of pictures, each in any of the forms; a column with such rows holds lists in all rows.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets
import numpy as np
import pyarrow as pa

_BATCH = 64  # rows at a time
_FEW = 8  # rows of lists at a time; a number may take 8 bytes, and a row have many pictures
_URI = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_HEAD = 176  # letters of the first 132 bytes, of which a DICOM file's mark are the last
_PATH = 4096  # no path is longer
_STARTS = (
    b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"P4", b"P5", b"P6", b"\0\0\x01\0",
)  # fmt: skip
_KIND = datasets.Image(decode=False)
_KINDS = datasets.List(_KIND)


def with_bytes(rows: datasets.Dataset, root: Path) -> datasets.Dataset:
    """Decodes the column ``image`` where it holds base64 texts or lists of numbers.

    Args:
        rows: with a column ``image``.
        root: the folder of relative paths. A text that is the path of a file stays a path.

    Returns:
        The same rows; the column is ``{"bytes", "path"}`` if it held such pictures, and a list of
        these, with absolute paths, if it held lists of pictures.
    """
    feature = rows.features["image"]
    few: dict[str, Any] = {"batched": True, "batch_size": _FEW, "writer_batch_size": _FEW}
    if is_list(feature) or _any_list(rows):
        few["features"] = datasets.Features({**rows.features, "image": _KINDS})
        few["fn_kwargs"] = {"root": str(root)}
        if isinstance(feature, datasets.Json):
            return rows.map(_decoded_lists, input_columns=["image"], **few)
        return rows.with_format("arrow").map(_table_of_lists, **few).with_format(None)
    if not may_embed(feature) or (_is_text(feature) and not _any_base64(rows, root)):
        return rows
    features = datasets.Features({**rows.features, "image": _KIND})
    if is_numbers(feature):  # without a Python object for each number
        lists = rows.with_format("arrow")
        return lists.map(_table_of_bytes, features=features, **few).with_format(None)
    return rows.map(
        _decoded,
        batched=True,
        batch_size=_BATCH,
        writer_batch_size=_BATCH,
        features=features,
        input_columns=["image"],
        fn_kwargs={"root": str(root)},
    )


def may_embed(feature: Any) -> bool:
    """Whether a column of this type may hold pictures as texts or as numbers."""
    if isinstance(feature, dict):
        inner = feature.get("bytes")
        return inner is not None and (_is_text(inner) or is_numbers(inner))
    return _is_text(feature) or is_numbers(feature)


def is_embedded(text: str) -> bool:
    """Whether a text begins like a picture in base64 or a ``data:`` URI, and so is no path."""
    return bool(_URI.match(text)) or _starts_like_a_picture(text[:_HEAD])


def path_of(text: str, root: Path) -> str:
    """The absolute path that a text means: a path below ``root``, or a ``file://`` address."""
    address = urlsplit(text) if text[:7].lower() == "file://" else None
    if address and address.netloc in ("", "localhost"):
        text = unquote(address.path)
    return str(root / text)


def moved(row: dict[str, Any], file: Path, image: str) -> dict[str, Any]:
    """A row whose pictures' paths are absolute, where they were relative to its file.

    Args:
        row: of a text file.
        file: its absolute path.
        image: the name of the column of pictures.
    """
    names = {image, "image", "images", "file_name", "messages"} & row.keys()
    return {**row, **{name: _moved(row[name], str(file.parent)) for name in names}}


def _moved(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        apart = "://" in value[:20] or is_embedded(value) or not value
        return value if apart else os.path.join(folder, value)
    if _is_list(value):
        return [_moved(each, folder) if isinstance(each, str | dict) else each for each in value]
    if isinstance(value, dict):
        paths = {"path", "image", "image_url", "url"} & value.keys()
        paths |= {"content"} if isinstance(value.get("content"), list) else set()
        kept = {name: _moved(value[name], folder) for name in paths}
        return {**value, **kept}
    return value


def is_list(feature: Any) -> bool:
    """Whether a column of this type holds lists of pictures, if it holds pictures."""
    return isinstance(feature, datasets.List | datasets.LargeList) and not is_numbers(feature)


def is_numbers(feature: Any) -> bool:
    """Whether a column of this type holds lists of whole numbers."""
    if not isinstance(feature, datasets.List | datasets.LargeList):
        return False
    return "int" in getattr(feature.feature, "dtype", "")


def _is_text(feature: Any) -> bool:
    text = ("string", "large_string")
    return isinstance(feature, datasets.Json) or getattr(feature, "dtype", "") in text


def _any_list(rows: datasets.Dataset) -> bool:
    """Whether a column of a text file has a list of pictures."""
    if not isinstance(rows.features["image"], datasets.Json):
        return False
    column = rows.select_columns(["image"]).with_format(None)
    return any(_is_list(value) for batch in column.iter(_BATCH) for value in batch["image"])


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and not all(type(each) is int for each in value)


def _any_base64(rows: datasets.Dataset, root: Path) -> bool:
    if isinstance(rows.features["image"], datasets.Json):
        return True
    column = rows.select_columns(["image"]).with_format(None)
    return any(
        value and _picture(value, root) is not None
        for batch in column.iter(_BATCH)
        for value in batch["image"]
    )


def _table_of_bytes(table: pa.Table) -> pa.Table:
    """The same rows with their lists of numbers as ``{"bytes", "path"}``."""
    column = table["image"]
    contents = [_from_list(number) for chunk in column.chunks for number in chunk]
    values = [pa.array(contents, pa.binary()), pa.nulls(len(contents), pa.string())]
    images = pa.StructArray.from_arrays(values, ["bytes", "path"])
    return table.set_column(table.column_names.index("image"), "image", images)


def _from_list(value: pa.ListScalar) -> bytes | None:
    if not value.is_valid:
        return None
    numbers = value.values
    return b"" if numbers.null_count else _from_numbers(numbers.to_numpy(zero_copy_only=False))


def _decoded(images: Sequence[Any], root: str) -> dict[str, list[Any]]:
    return {"image": [picture_of(value, Path(root)) for value in images]}


def _table_of_lists(table: pa.Table, root: str) -> pa.Table:
    """The same rows with lists of ``{"bytes", "path"}``."""
    lists = _decoded_lists(table["image"].to_pylist(), root)["image"]
    images = pa.array(lists, pa.list_(_KIND.pa_type))
    return table.set_column(table.column_names.index("image"), "image", images)


def _decoded_lists(images: Sequence[Any], root: str) -> dict[str, list[Any]]:
    return {"image": [_pictures_of(value, Path(root)) for value in images]}


def _pictures_of(value: Any, root: Path) -> list[Any]:
    """The pictures of a row, whose value may be one picture; a list without any is empty."""
    several = _is_list(value) or not value
    return [picture_of(each, root) for each in (value or [] if several else [value])]


def picture_of(value: Any, root: Path) -> dict[str, Any]:
    """A picture in any form as ``{"bytes", "path"}``; the path of a file is absolute."""
    path = None
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
    if value is None or isinstance(value, Mapping):
        return {"bytes": None, "path": path_of(path, root) if path else None}
    if isinstance(value, bytes):
        return {"bytes": value, "path": path}
    if isinstance(value, str):
        content = _picture(value, root) if value else None
        if content is None:
            return {"bytes": None, "path": path_of(value, root) if value else None}
        return {"bytes": content, "path": path}
    return {"bytes": _from_numbers(value), "path": path}


def _from_numbers(value: Any) -> bytes:
    """The bytes; empty, which is no picture, if these are not numbers from 0 to 255."""
    try:
        numbers = np.asarray(value)
    except ValueError:
        return b""
    whole = numbers.ndim == 1 and numbers.dtype.kind in "iu" and numbers.size
    if not whole or numbers.min() < 0 or numbers.max() > 255:
        return b""
    return numbers.astype(np.uint8).tobytes()


def _picture(text: str, root: Path) -> bytes | None:
    """Decodes base64; None if the text is no base64 of a picture."""
    uri = _URI.match(text)
    letters = text[uri.end() :] if uri else text
    if not uri and not _starts_like_a_picture(letters[:_HEAD]):
        return None
    letters = "".join(letters.split())
    if not uri and (not _BASE64.fullmatch(letters) or _is_file(root, text)):
        return None
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        return b"" if uri else None


def _starts_like_a_picture(letters: str) -> bool:
    letters = "".join(letters.split())
    letters = letters[: len(letters) // 4 * 4]
    try:
        head = base64.b64decode(letters, validate=True)
    except (binascii.Error, ValueError):
        return False
    inner = head[4:8] == b"ftyp" or head[8:12] == b"WEBP" or head[128:132] == b"DICM"
    return len(head) > 16 and (head.startswith(_STARTS) or inner)


def _is_file(root: Path, text: str) -> bool:
    try:
        return len(text) <= _PATH and (root / text).is_file()
    except (OSError, ValueError):
        return False

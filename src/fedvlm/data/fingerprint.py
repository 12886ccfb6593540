"""A fingerprint of the rows of a run: hashes that show whether a resumed run gets the same rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

TEXT = ("row", "question", "answer", "rejected")
PICTURE = "image_hash"  # a column with the hash of each picture's bytes


def picture_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What decides a row's pictures: their hashes and names; empty where no hash is known."""
    known, images = row.get(PICTURE), row["image"]
    if not known:
        return ()
    every = images if isinstance(images, list) else [images]
    return (known, *(str(image["path"]) for image in every))


def keys_of_pictures(rows: Any) -> list[tuple[str, ...]]:
    """As :func:`picture_of`, for all rows, without their pictures' bytes in memory."""
    if PICTURE not in rows.column_names:
        return [()] * len(rows)
    found: list[tuple[str, ...]] = []
    for batch in rows.select_columns([PICTURE, "image"]).with_format("arrow").iter(batch_size=100):
        images = batch["image"].combine_chunks()
        bounds = None
        if pa.types.is_list(images.type):
            bounds, images = images.offsets.to_pylist(), images.values
        names = list(map(str, images.field("path").to_pylist()))
        for n, known in enumerate(batch[PICTURE].to_pylist()):
            own = names[n : n + 1] if bounds is None else names[bounds[n] : bounds[n + 1]]
            found.append((known, *own) if known else ())
    return found


def content(rows: Any, columns: Iterable[str | None] = ()) -> dict[str, str]:
    """Hashes of the rows' content, column by column; the order of the rows matters.

    Args:
        rows: from :func:`fedvlm.data.sources.load_rows`.
        columns: further columns that the run uses; names without a column are left out.

    Returns:
        Column -> 32 hexadecimal digits. The column ``image`` stands for the pictures' bytes.
    """
    wanted = dict.fromkeys((*TEXT, PICTURE, *(c for c in columns if c is not None)))
    chosen = [name for name in wanted if name in rows.column_names]
    read = chosen if PICTURE in chosen else [*chosen, "image"]
    hashes = {name: hashlib.blake2b(digest_size=16) for name in read}
    for batch in rows.select_columns(read).with_format("arrow").iter(batch_size=256):
        for name, values in zip(batch.column_names, batch.columns, strict=True):
            found = values.to_pylist()
            if name == "image":
                found = [_pictures(image) for image in found]
            for value in found:
                hashes[name].update(json.dumps(value, default=str).encode() + b"\n")
    named = {"image" if name == PICTURE else name: h.hexdigest() for name, h in hashes.items()}
    return dict(sorted(named.items()))


def _pictures(value: Any) -> Any:
    """As :func:`_picture`, of a row's picture or of each in its list of pictures."""
    return [_picture(each) for each in value] if isinstance(value, list) else _picture(value)


def _picture(image: dict[str, Any] | None) -> str | None:
    """The hash of a picture's bytes; of its path if there is no such file; None without both."""
    if image is None or not (image.get("bytes") or image.get("path")):
        return None
    encoded = image.get("bytes")
    if encoded is None:
        path = Path(image["path"])
        encoded = path.read_bytes() if path.is_file() else str(path).encode()
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()

"""Checks the pictures of a data set: finds those that cannot be used, and hashes all of them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from fedvlm import processes
from fedvlm.data.depth import CROWDED
from fedvlm.data.pictures import AS_GIVEN, SHRUNK, Pictures, Refused
from fedvlm.errors import DataError
from fedvlm.version import __version__

__all__ = ["Checked", "check_pictures", "open_image", "with_absolute_paths", "with_hashes"]

logger = logging.getLogger("fedvlm")

HASH = 16  # bytes
_CHUNK = 16  # rows that a thread checks at a time
_PACKED = 8_000_000  # bytes; a larger pickle holds the images themselves
_MAPPED = 512  # rows after which a memory-mapped file is mapped again, which frees its pages
_OPENED = 32  # approximate limit on how often it is mapped

open_image = Pictures().open


@dataclass
class Checked:
    """The result of a check, by position in the rows.

    Attributes:
        broken: position -> reason, for the pictures that cannot be used.
        hashes: for every row the hash of its encoded picture in hexadecimal, or the hashes of its
            pictures with a space between; empty where a picture is missing or its file cannot be
            read.
        notes: what was done to pictures -> number of pictures.
    """

    broken: dict[int, str] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def report(self, name: str) -> None:
        """Logs once what was done to the pictures of the data set ``name``."""
        if self.notes[SHRUNK]:
            logger.warning("%s: %d pictures are %s", name, self.notes[SHRUNK], SHRUNK)
        if self.notes[CROWDED]:
            logger.warning(
                "%s: %d pictures are nearly one shade: 99 %% of their pixels have an eighth of the "
                "256 grey levels, as with outliers or padding; set data.window=[low,high] "
                "(docs/data.md)",
                name,
                self.notes[CROWDED],
            )
        done = {note: n for note, n in self.notes.items() if note not in (SHRUNK, CROWDED)}
        if done:
            as_given = done.keys() <= set(AS_GIVEN)
            logger.log(
                logging.INFO if as_given else logging.WARNING,
                "%s: pictures of more than 8 bits or several frames, by what was done to them "
                "(docs/data.md; data.window sets one range for all): %s",
                name,
                ", ".join(f"{note}: {n}" for note, n in sorted(done.items())),
            )


def check_pictures(
    rows: datasets.Dataset, pictures: Pictures | None = None, *, keep: bool = True
) -> Checked:
    """Opens every picture as training does, and hashes its encoded bytes.

    If all pictures are embedded, the result is kept in the data-set cache under the fingerprint of
    ``rows``, the settings and the versions. It is not kept for files, which may change while the
    fingerprint does not.

    Args:
        rows: rows with ``image``: encoded pictures, or lists of them.
        pictures: the settings; None: the defaults.
        keep: whether the result may be kept in the data-set cache.

    Raises:
        FedVLMError: a picture needs a package that is not installed.
    """
    pictures = pictures or Pictures()
    store = _Verdicts([rows._fingerprint, __version__, pictures.key()])
    known = store.read(len(rows)) if keep else None
    if known is not None:
        return known
    found, embedded = Checked(), True
    with warnings.catch_warnings(), ThreadPoolExecutor(_threads()) as pool:
        warnings.simplefilter("ignore")
        chunks = _chunks(rows.select_columns(["image"]).with_format("arrow"))
        while window := list(islice(chunks, 2 * _threads())):  # bounds the memory
            for part, all_bytes in pool.map(partial(_check_chunk, pictures), window):
                found.broken |= {len(found.hashes) + at: why for at, why in part.broken.items()}
                found.hashes += part.hashes
                found.notes += part.notes
                embedded &= all_bytes
    if embedded and keep:
        store.write(found)
    return found


def with_hashes(rows: datasets.Dataset, hashes: list[str]) -> datasets.Dataset:
    """Adds the column ``image_hash``, without a copy of the pictures of a sample of rows."""
    name = "image_hash"
    names = [*rows.column_names, name]
    mark = hashlib.blake2b("".join([rows._fingerprint, *hashes]).encode(), digest_size=8)
    sample = rows._indices
    if sample is not None:  # add_column would write the rows of the sample anew
        rows = datasets.Dataset(rows._data, info=rows.info, split=rows.split)
        everywhere = np.full(len(rows), "", dtype=object)
        everywhere[sample.column(0).to_numpy()] = hashes
        hashes = everywhere.tolist()
    rows = rows.add_column(name, hashes, new_fingerprint=mark.hexdigest())
    rows = rows.select_columns(names)  # add_column forgets their order
    return rows if sample is None else rows.select(sample.column(0).to_numpy())


def with_absolute_paths(images: pa.StructArray, root: Path) -> pa.StructArray:
    """Makes the paths of the pictures absolute that are not embedded; copies no picture."""
    contents, paths = images.field("bytes"), images.field("path").to_pylist()
    absolute = [
        str(root / path) if path and not content.is_valid else path
        for content, path in zip(contents, paths, strict=True)
    ]
    columns = [contents, pa.array(absolute, pa.string())]
    return pa.StructArray.from_arrays(columns, ["bytes", "path"], mask=images.is_null())


def _threads() -> int:
    return min(8, processes.cores())


def _chunks(images: datasets.Dataset) -> Iterator[pa.Array]:
    # The pickle of a memory-mapped table has the name of the file, not its contents.
    packed = pickle.dumps(images) if images.cache_files else b""
    mapped = 0 < len(packed) < _PACKED
    # Each mapping visits all pieces of the table, so their number is bounded.
    often = max(_MAPPED, len(images) // _OPENED // _CHUNK * _CHUNK)
    for start in range(0, len(images), _CHUNK):
        if mapped and start % often == 0:
            images = pickle.loads(packed)
        yield from images[start : start + _CHUNK]["image"].chunks


def _check_chunk(pictures: Pictures, rows: pa.Array) -> tuple[Checked, bool]:
    """Checks some rows; the second value is whether all their pictures are embedded."""
    found, all_bytes = Checked(), True
    for at, value in enumerate(_values(rows)):
        each = value if isinstance(value, list) else [value]
        all_bytes &= all(one["bytes"] is not None for one in each)
        found.hashes.append(hashes(each))
        try:
            for look in pictures.each(value, partial(pictures.look, draft=True)):
                found.notes.update(look.notes)
        except Refused as error:
            found.broken[at] = str(error)
        except DataError as error:
            missing = isinstance(error.__cause__, FileNotFoundError)
            found.broken[at] = str(error) if missing else f"corrupt image, {error}"
    return found, all_bytes


def _values(images: pa.Array) -> Iterator[Any]:
    """The pictures of each row, without copies of their bytes; a list if the column has lists."""
    if isinstance(images, pa.ListArray):
        for row in images:
            yield list(_values(row.values)) if row.is_valid else []
        return
    contents, paths = images.field("bytes"), images.field("path")
    for at in range(len(images)):
        content = contents[at].as_buffer() if images[at].is_valid else None
        path = paths[at].as_py() if images[at].is_valid else None
        yield {"bytes": None if content is None else memoryview(content), "path": path}


def hashes(pictures: Iterable[dict[str, Any]]) -> str:
    """The hashes of a row's pictures; empty if one of them cannot be read."""
    each = [_hash(picture) for picture in pictures]
    return " ".join(each) if all(each) else ""


def _hash(value: dict[str, Any]) -> str:
    """The hash of a picture's encoded bytes; empty if they cannot be read."""
    if value["bytes"] is not None:
        return hashlib.blake2b(value["bytes"], digest_size=HASH).hexdigest()
    try:
        if not os.path.isfile(value["path"] or ""):
            return ""
        with open(value["path"], "rb") as handle:
            digest = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=HASH))
            return digest.hexdigest()
    except (OSError, ValueError):
        return ""


class _Verdicts:
    """The result of an earlier check of the same rows, a small file in the data-set cache.

    Its first line is a hash of the rest, so a damaged file is noticed.
    """

    def __init__(self, key: list[Any]):
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "fedvlm"
        name = hashlib.blake2b(json.dumps(key).encode(), digest_size=HASH).hexdigest()
        self.path = folder / f"images-{name}.json"

    def read(self, rows: int) -> Checked | None:
        try:
            digest, _, text = self.path.read_bytes().partition(b"\n")
            if digest.decode() != hashlib.blake2b(text, digest_size=HASH).hexdigest():
                return None
            broken, hashes, notes = json.loads(text)
            found = Checked({int(at): why for at, why in broken.items()}, hashes, Counter(notes))
        except (OSError, ValueError, AttributeError):
            return None
        return found if len(found.hashes) == rows else None

    def write(self, found: Checked) -> None:
        """Saves atomically. If the cache cannot be written, the next run checks again."""
        text = json.dumps([found.broken, found.hashes, found.notes]).encode()
        digest = hashlib.blake2b(text, digest_size=HASH).hexdigest().encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                dir=self.path.parent, suffix=".tmp", delete=False
            ) as handle:
                handle.write(digest + b"\n" + text)
            os.replace(handle.name, self.path)
        except OSError:
            return

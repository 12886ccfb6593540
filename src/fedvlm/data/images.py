"""Encoded images: decode one to RGB, and find the ones of a data set that do not decode."""

from __future__ import annotations

import io
import json
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from fedvlm import processes
from fedvlm.errors import DataError

_CHUNK = 16  # rows that a thread checks at a time
_PACKED = 8_000_000  # bytes; a larger table holds its contents
_MAPPED = 512  # rows after which a memory-mapped file is mapped anew, to let go of its pages
_OPENED = 32  # but at most about this often


def open_image(value: Any) -> Image.Image:
    """Decodes one image to RGB, the right way up.

    The EXIF orientation is applied, transparency is composited on white, and pixels of more than
    8 bits are scaled to 8 bits (16-bit X-rays stay visible); of an animation the first frame is
    taken.

    Args:
        value: ``{"bytes": ..., "path": ...}`` as in a row of :func:`load_rows`, encoded bytes, a
            path, or a PIL image.

    Raises:
        DataError: when the value is no image or does not decode; the message is the reason.
    """
    try:
        image = value if isinstance(value, Image.Image) else Image.open(_stream(value))
        turned = ImageOps.exif_transpose(image)
        return _rgb(image if turned is None else turned)
    except DataError:
        raise
    except Exception as error:  # PIL raises about ten types, SyntaxError among them
        raise DataError(f"the image does not decode: {_reason(error)}") from error


def broken_images(rows: datasets.Dataset) -> dict[int, str]:
    """Finds the rows whose image does not decode: position in ``rows`` -> the reason.

    Every image is opened and its data read to the end, at the lowest resolution that the format
    allows. The answer is kept in the data-set cache under the fingerprint of ``rows`` where the
    images are embedded (files elsewhere may change without the fingerprint changing).
    """
    store = _Verdicts(rows._fingerprint)
    known = store.read()
    if known is not None:
        return known
    broken: dict[int, str] = {}
    embedded = True
    with warnings.catch_warnings(), ThreadPoolExecutor(_threads()) as pool:
        warnings.simplefilter("ignore")
        chunks = _chunks(rows.select_columns(["image"]).with_format("arrow"))
        while window := list(islice(chunks, 2 * _threads())):  # bounds what is in memory
            for start, verdicts, all_bytes in pool.map(_check_chunk, window):
                broken.update({start + i: reason for i, reason in verdicts})
                embedded &= all_bytes
    if embedded:
        store.write(broken)
    return broken


def _stream(value: Any) -> Any:
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        if content is None and not path:
            raise DataError("there is no image: neither bytes nor a path")
        return io.BytesIO(content) if content is not None else path
    if isinstance(value, bytes | bytearray | memoryview):
        return io.BytesIO(value)
    if isinstance(value, str | Path):
        return value
    raise DataError(f"an image is a dict with bytes or path, bytes or a path; got {value!r:.60}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits or floats -> 8 bits; PIL's own conversion clips at 255."""
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode == "F":
        full = 1.0 if pixels.max() <= 1.0 else 255.0
    else:
        full = 255.0 if image.mode == "I" and pixels.max() <= 255 else 65535.0
    return Image.fromarray(np.clip(np.rint(pixels * (255.0 / full)), 0, 255).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no file '{error.filename}'"
    if "cannot identify image file" in str(error):
        return "not an image in a known format"
    return f"{type(error).__name__}: {error}"


def _threads() -> int:
    return min(8, processes.cores())


def _chunks(images: datasets.Dataset) -> Iterator[tuple[int, pa.StructArray]]:
    # Of a memory-mapped table the name is pickled, not the contents.
    packed = pickle.dumps(images) if images.cache_files else b""
    mapped = 0 < len(packed) < _PACKED
    # Opening goes through all pieces of the table: a bounded number of times.
    often = max(_MAPPED, len(images) // _OPENED // _CHUNK * _CHUNK)
    for start in range(0, len(images), _CHUNK):
        if mapped and start % often == 0:
            images = pickle.loads(packed)
        for chunk in images[start : start + _CHUNK]["image"].chunks:
            yield start, chunk
            start += len(chunk)


def _check_chunk(
    job: tuple[int, pa.StructArray],
) -> tuple[int, list[tuple[int, str]], bool]:
    start, images = job
    broken, all_bytes = [], True
    contents, paths = images.field("bytes"), images.field("path")
    for i in range(len(images)):
        content = contents[i].as_buffer() if images[i].is_valid else None
        all_bytes &= content is not None
        path = paths[i].as_py() if content is None and images[i].is_valid else None
        reason = _verdict(content, path)
        if reason:
            broken.append((i, reason))
    return start, broken, all_bytes


def _verdict(content: pa.Buffer | None, path: str | None) -> str:
    """Why the image does not decode; empty when it does."""
    if content is None and not path:
        return "there is no image: neither bytes nor a path"
    try:
        source: Any = path if content is None else io.BytesIO(content)
        with Image.open(source) as image:
            image.draft("L", (1, 1))
            image.load()
    except Exception as error:
        return _reason(error)
    return ""


class _Verdicts:
    """What an earlier check of the same rows found, as a small file in the data-set cache."""

    def __init__(self, fingerprint: str):
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "fedvlm"
        self.path = folder / f"images-{fingerprint}.json"

    def read(self) -> dict[int, str] | None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {int(row): str(reason) for row, reason in found.items()}
        except (OSError, ValueError, AttributeError):
            return None

    def write(self, broken: dict[int, str]) -> None:
        """Saves atomically; a cache that cannot be written costs time, not correctness."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, suffix=".tmp", delete=False, encoding="utf-8"
            ) as handle:
                json.dump(broken, handle)
            os.replace(handle.name, self.path)
        except OSError:
            return

"""Encoded images: decodes one to RGB, and finds those of a data set that do not decode."""

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
_PACKED = 8_000_000  # bytes; a larger pickle holds the images themselves
_MAPPED = 512  # rows after which a memory-mapped file is mapped again, which frees its pages
_OPENED = 32  # approximate limit on how often it is mapped


def open_image(value: Any) -> Image.Image:
    """Decodes one image to RGB, the right way up.

    The EXIF orientation is applied. Transparency is composited on white. Pixels of more than 8 bits
    are scaled to 8 bits, so that 16-bit X-rays stay visible. An animation gives its first frame.

    Args:
        value: ``{"bytes": ..., "path": ...}`` as in a row of :func:`load_rows`, encoded bytes, a
            path, or a PIL image.

    Raises:
        DataError: the value is not an image or does not decode; the message is the reason.
    """
    try:
        image = value if isinstance(value, Image.Image) else Image.open(_stream(value))
        turned = ImageOps.exif_transpose(image)
        return _rgb(image if turned is None else turned)
    except DataError:
        raise
    except Exception as error:  # PIL raises about ten types, including SyntaxError
        raise DataError(f"the image does not decode: {_reason(error)}") from error


def broken_images(rows: datasets.Dataset) -> dict[int, str]:
    """Finds the rows whose image does not decode.

    Every image is opened and read to the end, at the lowest resolution that its format allows. If
    all images are embedded, the result is kept in the data-set cache under the fingerprint of
    ``rows``. It is not kept for image files, which may change while the fingerprint does not.

    Returns:
        Position in ``rows`` -> reason, for the images that do not decode.
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
        while window := list(islice(chunks, 2 * _threads())):  # bounds the memory
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
    """Scales greyscale of 16 bits, 32 bits or floats to 8 bits. PIL would clip it at 255."""
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
    # The pickle of a memory-mapped table has the name of the file, not its contents.
    packed = pickle.dumps(images) if images.cache_files else b""
    mapped = 0 < len(packed) < _PACKED
    # Each mapping visits all pieces of the table, so their number is bounded.
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
    """The reason why an image does not decode; empty if it decodes."""
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
    """The result of an earlier check of the same rows, a small file in the data-set cache."""

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
        """Saves atomically. If the cache cannot be written, the next run checks again."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, suffix=".tmp", delete=False, encoding="utf-8"
            ) as handle:
                json.dump(broken, handle)
            os.replace(handle.name, self.path)
        except OSError:
            return

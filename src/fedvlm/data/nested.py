"""Sizes of pictures that lie inside icons (ICO, ICNS) and textures (BLP).

Pillow decodes such a picture without a comparison of its size with that in the file's header.
"""

from __future__ import annotations

import io
import struct
from typing import Any, BinaryIO

from PIL.BmpImagePlugin import DibImageFile
from PIL.IcoImagePlugin import IcoFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

Size = tuple[int, int]

ICO = b"\0\0\1\0"  # Pillow decodes it already when it opens it


def icon_size(stream: BinaryIO) -> Size:
    """The size of the picture that Pillow chooses of an ICO file.

    Raises:
        Exception: any of Pillow's, for a broken file.
    """
    stream.seek(0)
    at = IcoFile(stream).entry[0].offset
    if png := _size(PngImageFile, stream, at):
        return png
    stream.seek(at)
    width, height = DibImageFile(stream, "").size
    return width, height // 2  # the picture, and its mask below


def inner_sizes(image: Any) -> list[Size]:
    """The sizes of the pictures inside an opened picture that is not loaded; none if broken."""
    found: list[Size | None] = []
    if image.format == "ICNS":
        blocks, kinds = image.icns.dct, image.icns.SIZES[image.best_size]
        places = [blocks[code][0] for code, _ in kinds if code in blocks]
        for kind in (PngImageFile, Jpeg2KImageFile):
            found += [_size(kind, image.icns.fobj, at) for at in places]
    elif image.format == "BLP" and image.tile[0][0] == "BLP1":
        jpeg = _jpeg_of_blp(image.fp, image.tile[0][2])
        found.append(_size(JpegImageFile, io.BytesIO(jpeg), 0))
    return [size for size in found if size]


def _size(kind: Any, stream: BinaryIO, at: int) -> Size | None:
    """The size of the picture of this kind that begins at a place; None if there is none."""
    stream.seek(at)
    try:
        size: Size = kind(stream, "").size
    except Exception:  # another kind, or broken
        return None
    return size


def _jpeg_of_blp(stream: BinaryIO, at: int) -> bytes:
    """The JPEG in a BLP file: its tables are apart from its data."""
    stream.seek(at)
    table = stream.read(132)
    if len(table) < 132:
        return b""
    offset, length = (struct.unpack("<I", table[place : place + 4])[0] for place in (0, 64))
    header = stream.read(struct.unpack("<I", table[128:])[0])
    stream.seek(max(offset, stream.tell()))
    return header + stream.read(length)

"""Encoded pictures without their metadata, for pictures whose metadata break the decoder.

Only what the pixels need is kept: PNG's critical chunks and transparency, JPEG's tables and scans,
WEBP's picture, TIFF's structural tags. The pixels are copied as they are, so a corrupt picture
stays corrupt.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# Segments of JPEG that describe the picture: COM, and APP1 to APP15 without Adobe's APP14.
_JPEG_DROPPED = (0xFE, *range(0xE1, 0xEE), 0xEF)
_WEBP_DROPPED = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}  # with their flags in VP8X
# Size, bits, compression, photometric, fill order, orientation, strips, samples, planes,
# predictor, colour map, tiles, ink set, extra samples, sample format, JPEG tables, YCbCr.
_TIFF_KEPT = (
    *(256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320),
    *(322, 323, 324, 325, 332, 338, 339, 347, 512, 513, 514, 529, 530, 531, 532),
)


def without_metadata(content: bytes, *, exif: bool = False) -> bytes | None:
    """A picture's encoded bytes without metadata; None for other formats and broken structures.

    Args:
        content: the encoded picture.
        exif: keep EXIF, which has the orientation.
    """
    try:
        if content.startswith(_PNG):
            return _PNG + b"".join(_png(content, exif))
        if content.startswith(b"\xff\xd8\xff"):
            return b"\xff\xd8" + b"".join(_jpeg(content, exif))
        if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            return _webp(content, exif)
        if content[:4] in (b"II*\0", b"MM\0*"):
            return _tiff(content)
    except (struct.error, IndexError):
        pass
    return None


def _png(content: bytes, exif: bool) -> Iterator[bytes]:
    at = len(_PNG)
    while at + 8 <= len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        if kind in _PNG_KEPT or (exif and kind == b"eXIf"):
            yield content[at : at + size + 12]
        at += size + 12


def _jpeg(content: bytes, exif: bool) -> Iterator[bytes]:
    at = 2
    while True:
        while content[at : at + 2] == b"\xff\xff":  # padding
            at += 1
        marker, kind = content[at], content[at + 1]
        if marker != 0xFF or kind in (0xDA, 0xD9):  # the scan: entropy-coded to the end
            yield content[at:]
            return
        size = struct.unpack(">H", content[at + 2 : at + 4])[0]
        has_exif = kind == 0xE1 and content[at + 4 : at + 10] == b"Exif\0\0"
        if kind not in _JPEG_DROPPED or (exif and has_exif):
            yield content[at : at + 2 + size]
        at += 2 + size


def _webp(content: bytes, exif: bool) -> bytes:
    dropped = {kind: flag for kind, flag in _WEBP_DROPPED.items() if not exif or kind != b"EXIF"}
    kept, at = [], 12
    while at + 8 <= len(content):
        kind, size = struct.unpack("<4sI", content[at : at + 8])
        chunk = content[at : at + 8 + size + size % 2]
        if kind == b"VP8X":
            chunk = chunk[:8] + bytes([chunk[8] & ~sum(dropped.values())]) + chunk[9:]
        if kind not in dropped:
            kept.append(chunk)
        at += 8 + size + size % 2
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(content: bytes) -> bytes:
    """Keeps the structural tags of the first directory, where it lies."""
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack(order + "I", content[4:8])
    (count,) = struct.unpack(order + "H", content[start : start + 2])
    tags = [content[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    kept = [t for t in tags if len(t) == 12 and struct.unpack(order + "H", t[:2])[0] in _TIFF_KEPT]
    table = struct.pack(order + "H", len(kept)) + b"".join(kept) + b"\0\0\0\0"
    result = bytearray(content)
    result[start : start + len(table)] = table
    return bytes(result)

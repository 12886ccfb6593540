"""Decodes one encoded picture to RGB, within limits on format, pixels and memory.

Training, prediction and the check of a data set all call :meth:`Pictures.open` or
:meth:`Pictures.look`, so a picture that passes the check opens later.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedvlm.data import depth, dicom, nested, sixteen
from fedvlm.data.metadata import without_metadata
from fedvlm.errors import DataError, FedVLMError, brief
from fedvlm.settings.pictures import FORMATS
from fedvlm.settings.sections import DataConfig

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its errors go to the terminal

_RULES = 3  # number of this module's rules; a new one discards what was cached under older rules
_REASON = 200  # most characters of a reason
_STRIP = 1 << 22  # pixels that are composited at a time, which bounds the memory
_ORIENTATION, _PHOTOMETRIC = 0x0112, 0x0106
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SHRUNK = "shrunk to data.max_pixels"
INVERTED = "inverted, as the TIFF header demands"
# No guess:
AS_GIVEN = ("16 bits", "data.window", "the file's window", "the file's LUT", INVERTED)


class Refused(DataError):
    """A limit or setting excludes the picture; it is not corrupt."""


@dataclass(frozen=True)
class Look:
    """A decoded picture.

    Attributes:
        image: the picture.
        notes: what was done to it, such as ``12 bits``.
        pixels: the number of its pixels before it was shrunk.
    """

    image: Image.Image
    notes: list[str] = field(default_factory=list)
    pixels: int = 0


@dataclass(frozen=True)
class Pictures:
    """The settings by which pictures are opened; see the section ``data`` of the configuration.

    Attributes:
        max_decoded: most MiB of the decoded pictures of a row, at 3 bytes a pixel or more.
        max_pixels: most pixels of a picture; larger pictures are shrunk. None: no limit.
        formats: names of the formats that are opened.
        window: values that become black and white in pictures of more than 8 bits.
        max_images: most pictures of a row.
    """

    max_decoded: int = 256
    max_pixels: int | None = None
    formats: tuple[str, ...] = FORMATS
    window: depth.Window | None = None
    max_images: int = 16

    @classmethod
    def of(cls, data: DataConfig) -> Pictures:
        """The settings of a run's section ``data``."""
        formats = tuple(sorted(set(data.formats))) if data.formats else FORMATS
        return cls(data.max_decoded, data.max_pixels, formats, data.window, data.max_images)

    def key(self) -> list[Any]:
        """All that determines a picture's pixels, next to its bytes: settings and versions."""
        versions = [_version("pillow"), _version("pydicom")]
        limits = [self.max_decoded, self.max_pixels, self.max_images]
        return [_RULES, *limits, self.formats, self.window, versions]

    def open(self, value: Any) -> Image.Image:
        """Decodes one picture to RGB, the right way up.

        The EXIF orientation is applied. Broken metadata are ignored. Transparency is composited on
        white. Greyscale of more than 8 bits is mapped to 8 bits, see :mod:`fedvlm.data.depth`. An
        animation gives its first frame. A picture above ``max_pixels`` is shrunk.

        Args:
            value: ``{"bytes": ..., "path": ...}`` as in a row of :func:`load_rows`, encoded bytes,
                a path, or a PIL image.

        Raises:
            DataError: the value is not a picture, does not decode, or a limit excludes it.
            FedVLMError: it is a DICOM file, and pydicom is not installed.
        """
        return self.opened(value).image

    def open_all(self, value: Any) -> list[Image.Image]:
        """As :meth:`open`, for the pictures of a row; ``value`` is one picture or a list."""
        return [look.image for look in self.each(value, self.opened)]

    def each(self, value: Any, look: Callable[[Any], Look]) -> list[Look]:
        """The pictures of a row, one after another by ``look``, within the limits on a row."""
        if not isinstance(value, list | tuple):
            return [look(value)]
        if not value:
            raise Refused("its list of pictures is empty")
        count, looks = len(value), list[Look]()
        if count > self.max_images:
            raise Refused(f"it has {count} pictures, more than data.max_images={self.max_images}")
        for number, picture in enumerate(value, 1):
            try:
                looks.append(look(picture))
            except DataError as error:
                place = f"picture {number} of {count}: " if count > 1 else ""
                raise type(error)(f"{place}{error}") from error
            if 3 * sum(each.pixels for each in looks) > self.max_decoded << 20:
                raise Refused(
                    f"its first {number} of {count} pictures take more than "
                    f"data.max_decoded={self.max_decoded} MiB together when decoded"
                )
        return looks

    def opened(self, value: Any) -> Look:
        """As :meth:`open`, and with what was done to the picture."""
        try:
            return self.look(value)
        except Refused:
            raise
        except DataError as error:
            raise DataError(f"the image does not decode: {error}") from error

    def look(self, value: Any, *, draft: bool = False) -> Look:
        """Does the work of :meth:`open`, and reports what was done to the picture.

        Args:
            value: as in :meth:`open`.
            draft: decode a JPEG at its lowest resolution. All of its data are read nevertheless.

        Raises:
            Refused: a limit or setting excludes the picture; the message is the reason.
            DataError: the picture is corrupt; the message is the reason.
            FedVLMError: it is a DICOM file, and pydicom is not installed.
        """
        try:
            if isinstance(value, Image.Image):
                self._fits(value.size)
                return self._prepared(value)
            with _stream(value) as (stream, name):
                return self._read(stream, name, draft)
        except FedVLMError:
            raise
        except Exception as error:  # Pillow raises about ten types, including SyntaxError
            raise DataError(_reason(error)) from error

    def identified(self, stream: BinaryIO, *, magic: bool = False) -> Image.Image | None:
        """Reads the header of a picture; None if no format matches.

        Args:
            stream: the file.
            magic: leave out the formats without a magic number, which many files seem to fit.

        Other than ``Image.open``, it does not compare the size with ``Image.MAX_IMAGE_PIXELS``,
        which all threads share.

        Raises:
            Refused: it is an ICO file with a picture above the limit.
            UnidentifiedImageError: the header fits a format, and is broken.
        """
        stream.seek(0)
        prefix, why = stream.read(16), ""
        for factory, accept in _openers(self.formats):
            if magic and accept is None:
                break
            try:
                accepted = not accept or accept(prefix)
                if isinstance(accepted, str):
                    why = accepted
                elif accepted:
                    if prefix.startswith(nested.ICO):
                        self._fits(nested.icon_size(stream))
                    stream.seek(0)
                    return factory(stream, "")
            except Refused:
                raise
            except Exception as error:  # the next format may fit
                why = _reason(error) if accept else why  # a format with a magic number
        if why:
            raise UnidentifiedImageError(why)
        return None

    def _read(self, stream: BinaryIO, name: str, draft: bool) -> Look:
        if dicom.is_dicom(stream.read(dicom.HEAD), name):
            if "DICOM" not in self.formats:
                raise Refused("DICOM is not one of data.formats")
            stream.seek(0)
            image, notes = dicom.open_dicom(stream, self.window, self._fits)
            return self._shrunk(image.convert("RGB"), image.size, notes)
        try:
            return self._decoded(stream, draft)
        except FedVLMError:
            raise
        except Exception:
            if stream.seek(0, io.SEEK_END) > self.max_decoded << 20:
                raise
            stream.seek(0)
            content = stream.read()
            bare = without_metadata(content)
            if bare is None:
                raise
            upright = without_metadata(content, exif=True)
            if upright is not None and upright != bare:
                with suppress(Exception):
                    return self._decoded(io.BytesIO(upright), draft)
            return self._decoded(io.BytesIO(bare), draft)

    def _decoded(self, stream: BinaryIO, draft: bool) -> Look:
        image = self.identified(stream)
        if image is None:
            known = "a known format" if self.formats == FORMATS else "a format of data.formats"
            raise DataError(f"not an image in {known}")
        for inside in (image.size, *nested.inner_sizes(image)):
            self._fits(inside)
        notes = [dicom.SEVERAL] if self._has_frames(image, stream) else []
        size, raw = image.size, sixteen.raw_mode(image)
        if draft:
            image.draft("L", (1, 1))
        elif self.max_pixels and size[0] * size[1] > self.max_pixels:
            image.draft(None, _within(size, self.max_pixels))
        image.load()
        self._fits(image.size)  # some formats hold a picture of another size
        if raw and sixteen.is_dark(image) and (again := self.identified(stream)):
            sixteen.load_lower(again)
            image, done = sixteen.by_content(_upright(image), _upright(again), raw)
            return self._shrunk(_rgb(image), size, [*notes, *done])
        if raw:
            colours = np.asarray(image)[..., :-1] if image.mode.endswith("A") else np.asarray(image)
            notes += [depth.CROWDED] if depth.is_crowded(colours, colours) else []
        return self._prepared(image, size, notes)

    def _has_frames(self, image: Any, stream: BinaryIO) -> bool:
        """Whether a file has several frames or pages."""
        if image.format == "PSD":  # the layers of one picture
            return False
        try:
            if image.format == "GIF":  # a look at the second frame changes the opened picture
                image = self.identified(stream)
            return bool(getattr(image, "is_animated", False))
        except Exception:  # broken behind the first frame
            return False

    def _fits(self, size: tuple[int, int], each: int = 3) -> None:
        """Compares the size in the header with the limit."""
        width, height = size
        if width < 1 or height < 1:
            raise DataError(f"it has {width} x {height} pixels")
        if width * height * each > self.max_decoded << 20:
            mib = -(-width * height * each >> 20)
            raise Refused(
                f"the image has {width} x {height} pixels, {mib} MiB when decoded, more than "
                f"data.max_decoded={self.max_decoded}"
            )

    def _prepared(
        self, image: Image.Image, size: tuple[int, int] | None = None, notes: Sequence[str] = ()
    ) -> Look:
        notes = list(notes)
        dark_is_high = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
        image = _upright(image)
        if image.mode.startswith(("I", "F")):
            pixels, done = depth.eight_bits(np.asarray(image), self.window)
            image = Image.fromarray(255 - pixels if dark_is_high else pixels)
            notes += [*done, INVERTED] if dark_is_high else done  # Pillow inverts 8 bits itself
        return self._shrunk(_rgb(image), size or image.size, notes)

    def _shrunk(self, image: Image.Image, size: tuple[int, int], notes: list[str]) -> Look:
        limit, pixels = self.max_pixels, size[0] * size[1]
        if limit is None or pixels <= limit:
            return Look(image, notes, pixels)
        if image.width * image.height > limit:
            image = image.resize(_within(image.size, limit), Image.Resampling.LANCZOS)
        return Look(image, [*notes, SHRUNK], pixels)


def _within(size: tuple[int, int], limit: int) -> tuple[int, int]:
    """The largest size of the same aspect with at most ``limit`` pixels."""
    width, height = size
    factor = (limit / (width * height)) ** 0.5
    narrow = max(1, int(width * factor))
    low = max(1, min(int(height * factor), limit // narrow))
    return min(narrow, limit // low), low


@contextmanager
def _stream(value: Any) -> Iterator[tuple[BinaryIO, str]]:
    """The encoded picture as an open file, and its name, if it has one."""
    name = ""
    if isinstance(value, Mapping):
        content, name = value.get("bytes"), value.get("path") or ""
        if content is None and not name:
            raise DataError("there is no image: neither bytes nor a path")
        value = content if content is not None else name
    if isinstance(value, bytes | bytearray | memoryview):
        if len(value) == 0:
            raise DataError("the picture is empty")
        yield io.BytesIO(value), str(name)
    elif isinstance(value, str | Path):
        # A pipe or a device would block, or never end.
        status = os.stat(value)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"'{value}' is not a file")
        if status.st_size == 0:
            raise DataError("the picture is empty")
        with open(value, "rb") as handle:
            yield handle, str(value)
    else:
        raise DataError(
            f"an image is a dict with bytes or path, bytes or a path; got {value!r:.60}"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation, unless the metadata are broken."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    result = Image.new("RGB", image.size)
    height = max(1, _STRIP // image.width)
    for top in range(0, image.height, height):
        box = (0, top, image.width, min(top + height, image.height))
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return result


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no file '{error.filename}'"
    if isinstance(error, UnidentifiedImageError):
        return brief(str(error))
    if isinstance(error, OSError) and error.filename:
        return f"its file cannot be read: {error.strerror}"
    return brief(f"{type(error).__name__}: {error}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


_initializing = threading.Lock()


@cache
def _openers(formats: tuple[str, ...]) -> list[tuple[Any, Any]]:
    """Pillow's functions that open a format, and those that compare the first bytes, or None."""
    with _initializing:  # Pillow registers its formats without a lock
        Image.preinit()
        Image.init()
    known = [Image.OPEN[name] for name in Image.ID if name in formats]
    return sorted(known, key=lambda pair: pair[1] is None)  # what accepts anything comes last

"""Types of the settings that limit and prepare pictures: ``data.formats`` and ``data.window``."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

# Raster formats that Pillow decodes itself. The others (EPS, WMF, IPTC, MPEG, HDF5, GRIB, BUFR)
# start another program, open a file inside the file, or decode nothing.
FORMATS = (
    *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF"),
    *("ICNS", "ICO", "IM", "IMT", "JPEG", "JPEG2000", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR"),
    *("PNG", "PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
    *("XVTHUMB", "DICOM"),
)


def _listed(given: object) -> object:
    """Accepts ``PNG,JPEG`` and a single name too."""
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else given


def _known(names: list[str]) -> list[str]:
    upper = [name.upper() for name in names]
    unknown = [name for name in names if name.upper() not in FORMATS]
    if unknown or not names:
        got = f"{unknown[0]!r:.60} is not one of them" if unknown else "the list is empty"
        raise ValueError(f"formats is a list of {', '.join(FORMATS)}; {got}")
    return upper


def _pair(given: object) -> object:
    pair = _listed(given)
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError(f"window is [low, high], such as [-160, 240]; got {given!r:.60}")
    return pair


def _ordered(window: tuple[float, float]) -> tuple[float, float]:
    low, high = window
    if low >= high:
        raise ValueError(
            f"window is [low, high] with low below high, such as [-160, 240]; got {window}"
        )
    return window


Formats = Annotated[list[str], BeforeValidator(_listed), AfterValidator(_known)]
Window = Annotated[tuple[float, float], BeforeValidator(_pair), AfterValidator(_ordered)]

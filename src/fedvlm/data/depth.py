"""Greyscale of more than 8 bits becomes 8 bits, by a window or by the picture's content.

The range of a picture is read from the picture alone. So the result depends neither on the other
rows nor on the site, and prediction prepares a picture as training did.
"""

from __future__ import annotations

import numpy as np

Window = tuple[float, float]

_BITS = (8, 10, 12, 14, 16)
_TENTH = 0.1  # a conventional range of floats is used if the picture fills this share of it
_SMALLEST = 1e-300  # a range below it has no reciprocal
_STRIP = 1 << 20  # pixels that are scaled at a time, which bounds the memory


def eight_bits(pixels: np.ndarray, window: Window | None = None) -> tuple[np.ndarray, str]:
    """Maps a range of values to 0 .. 255.

    Args:
        pixels: integers or floats, ``[height, width]`` or ``[height, width, channels]``.
        window: the values that become black and white. None: :func:`range_of` the picture.

    Returns:
        The picture in unsigned 8 bits, and a name for the range.
    """
    low, high, name = (*window, "data.window") if window else range_of(pixels)
    return scaled(pixels, low, high), name


def range_of(pixels: np.ndarray) -> tuple[float, float, str]:
    """The range of values that is mapped to 0 .. 255, and a name for it.

    - Unsigned integers: the smallest of 8, 10, 12, 14 and 16 bits that holds the maximum.
    - Floats: 0 .. 1 or 0 .. 255 if they fill at least a tenth of this range and do not leave it.
    - All others, such as Hounsfield units: minimum to maximum.
    """
    known = pixels
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        known = pixels[np.isfinite(pixels)]
    if known.size == 0:
        return 0.0, 1.0, "no finite value"
    low, high = float(known.min()), float(known.max())
    if low >= 0 and pixels.dtype.kind == "f":
        for full in (1.0, 255.0):
            if _TENTH * full <= high <= full:
                return 0.0, full, f"floats of 0 to {full:.0f}"
    elif low >= 0 and high < 1 << _BITS[-1]:
        bits = next(bits for bits in _BITS if high < 1 << bits)
        return 0.0, float((1 << bits) - 1), f"{bits} bits"
    return low, high, "minimum to maximum"


def scaled(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Maps ``low .. high`` to 0 .. 255; values outside are clipped, NaN becomes 0."""
    half = high / 2 - low / 2  # halves stay finite, even between the largest floats of both signs
    if half < _SMALLEST:  # a picture of a single value
        return np.zeros(pixels.shape, np.uint8)
    result = np.empty(pixels.shape, np.uint8)
    step = max(1, _STRIP // max(1, pixels[0].size))
    for start in range(0, len(pixels), step):
        strip = pixels[start : start + step].astype(np.float64)
        strip = np.nan_to_num(strip, nan=low, posinf=high, neginf=low)
        strip = np.rint((strip / 2 - low / 2) * (255.0 / half))
        result[start : start + step] = np.clip(strip, 0, 255).astype(np.uint8)
    return result

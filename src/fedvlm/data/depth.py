"""Greyscale of more than 8 bits becomes 8 bits, by a window or by the picture's content.

The range of a picture is read from the picture alone. So the result depends neither on the other
rows nor on the site, and prediction prepares a picture as training did.
"""

from __future__ import annotations

import numpy as np

Window = tuple[float, float]

CROWDED = "crowded into an eighth of the grey levels"

_BITS = (8, 10, 12, 14, 16)
_AS_IT_IS = "8 bits"  # nothing was scaled
_TENTH = 0.1  # a conventional range of floats is used if the picture fills this share of it
_SHARE, _LEVELS = 0.99, 32  # a picture is crowded if so many pixels have so few levels of grey
_SMALLEST = 1e-300  # a range below it has no reciprocal
_STRIP = 1 << 20  # pixels that are scaled at a time, which bounds the memory


def eight_bits(pixels: np.ndarray, window: Window | None = None) -> tuple[np.ndarray, list[str]]:
    """Maps a range of values to 0 .. 255.

    Args:
        pixels: integers or floats, ``[height, width]`` or ``[height, width, channels]``.
        window: the values that become black and white. None: :func:`range_of` the picture.

    Returns:
        The picture in unsigned 8 bits, and what was done: a name for the range, and
        :data:`CROWDED` if the content set a range that is too wide.
    """
    if window:
        return scaled(pixels, *window), ["data.window"]
    low, high, name = range_of(pixels)
    levels = scaled(pixels, low, high)
    crowded = name != _AS_IT_IS and is_crowded(pixels, levels)
    return levels, [name, CROWDED] if crowded else [name]


def range_of(pixels: np.ndarray) -> tuple[float, float, str]:
    """The range of values that is mapped to 0 .. 255, and a name for it.

    - Unsigned integers: the smallest of 8, 10, 12, 14 and 16 bits that holds the maximum.
    - Floats: 0 .. 1 or 0 .. 255 if they fill at least a tenth of this range and do not leave it.
    - All others, such as Hounsfield units: minimum to maximum.
    """
    known = _finite(pixels)
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


def is_crowded(pixels: np.ndarray, levels: np.ndarray) -> bool:
    """Whether few extreme values or padding left little grey for the rest of a picture.

    At least 99 % of the pixels are within an eighth of the grey levels: all pixels, or those that
    are above the smallest value (padding), or those that are below the largest value. A picture of
    a single value is not crowded, nor is a mask of two values unless one of them has 99 %.

    Args:
        pixels: the values.
        levels: the same in 8 bits.
    """
    known = _finite(pixels)
    if known.size == 0 or known.min() == known.max():
        return False
    flat = levels.reshape(-1)
    parts = (flat[at : at + _STRIP] for at in range(0, flat.size, _STRIP))
    counts = np.sum([np.bincount(part, minlength=256) for part in parts], axis=0)
    padding = np.zeros((3, 256), counts.dtype)
    padding[1, flat.min()] = np.count_nonzero(known == known.min())
    padding[2, flat.max()] = np.count_nonzero(known == known.max())
    if padding.sum() == flat.size:  # two values
        padding = padding[:1]
    sums = np.cumsum(np.pad(counts - padding, ((0, 0), (1, 0))), axis=1)
    most = (sums[:, _LEVELS:] - sums[:, :-_LEVELS]).max(axis=1)
    return bool((most >= _SHARE * sums[:, -1]).any())


def _finite(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        return pixels[np.isfinite(pixels)]
    return pixels

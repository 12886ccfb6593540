"""Colour of 16 bits a channel. Pillow keeps the upper bytes; here the lower ones are read too.

A picture that uses only 8 to 14 of its 16 bits would be nearly black. It is decoded a second time,
with the name of the opposite byte order, which makes Pillow keep the lower bytes.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from PIL import Image

from fedvlm.data.depth import eight_bits

_NATIVE = "B" if sys.byteorder == "little" else "L"
# Pillow's raw mode that reads the upper bytes -> the one that reads the lower bytes. Grey with
# alpha has as many bytes as RGBA of 8 bits: upper and lower grey, upper and lower alpha.
_LOWER = {f"{mode};16{a}": f"{mode};16{b}" for mode in ("RGB", "RGBA") for a, b in ("BL", "LB")}
_LOWER |= {f"{mode};16N": f"{mode};16{_NATIVE}" for mode in ("RGB", "RGBA")}
_LOWER |= {"LA;16B": "RGBA"}
_DARK = 64  # upper bytes below it: at most 14 bits are used


def raw_mode(image: Image.Image) -> str:
    """Pillow's name for the layout of an opened picture; empty unless it has 16 bits a channel."""
    raw = {_raw(tile) for tile in getattr(image, "tile", [])}
    return raw.pop() if len(raw) == 1 and raw <= _LOWER.keys() else ""


def load_lower(image: Any) -> None:
    """Loads the lower bytes of an opened picture with a :func:`raw_mode`."""
    lower = _LOWER[raw_mode(image)]
    image.tile = [
        tile._replace(args=lower if isinstance(tile[3], str) else (lower, *tile[3][1:]))
        for tile in image.tile
    ]
    image.load()


def is_dark(upper: Image.Image) -> bool:
    """Whether the colours of a loaded picture of 16 bits use at most 14 of them."""
    extrema: Any = upper.getextrema()
    return max(high for _, high in extrema[:3]) < _DARK


def by_content(upper: Image.Image, lower: Image.Image, raw: str) -> tuple[Image.Image, list[str]]:
    """Maps colours of 16 bits to 8 bits, by the range of all channels.

    Args:
        upper: the loaded picture, RGB or RGBA.
        lower: the same, from :func:`load_lower`.
        raw: the raw mode of ``upper``, from :func:`raw_mode`.

    Returns:
        The picture, and what was done to it.
    """
    high, low = np.asarray(upper), np.asarray(lower)
    if raw == "LA;16B":
        values = (low[..., 0:3:2].astype(np.uint16) << 8) | low[..., 1:4:2]
        values = values[..., [0, 0, 0, 1]]
    else:
        values = (high.astype(np.uint16) << 8) | low
    colours, (name, *more) = eight_bits(values[..., :3])
    if values.shape[-1] == 4:
        colours = np.concatenate((colours, eight_bits(values[..., 3:])[0]), axis=-1)
    return Image.fromarray(colours), [f"{name} of 16 in colour", *more]


def _raw(tile: Any) -> str:
    args = tile[3]
    return args if isinstance(args, str) else str(args[0]) if args else ""

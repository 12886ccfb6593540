"""Draws the bundled scenes: coloured shapes on a dark ground, and handwritten digits.

All functions are pure, so equal scenes give equal pixels. A picture is drawn at twice its size and
averaged down. This anti-aliasing takes a fraction of a millisecond.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

DIGITS = Path(__file__).parents[1] / "assets" / "digits" / "digits.npz"
SIDE = 64  # pixels of a picture's edge
CELL = SIDE // 2  # a scene is a 2 x 2 grid of places
_ZOOM = 2

COLOURS = {
    "red": (225, 38, 38),
    "green": (40, 165, 60),
    "blue": (45, 85, 235),
    "yellow": (245, 220, 45),
    "orange": (250, 135, 25),
    "purple": (140, 50, 185),
    "pink": (250, 145, 195),
    "white": (240, 240, 240),
}
NEW_COLOURS = {"cyan": (50, 215, 220), "brown": (125, 78, 42)}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart")
NEW_SHAPES = ("hexagon", "cross", "crescent", "ring", "arrow", "house")
PATTERNS = ("plain", "slanted", "woven", "speckled", "shaded")
TEXTURES = ("striped", "banded", "dotted", "checkered", "hollow", "split")
LETTERS = ("A", "C", "E", "F", "H", "K", "L", "M", "N", "R", "T", "U", "V", "X", "Y")
PLACES = ("top left", "top right", "bottom left", "bottom right")
RADII = {"large": (11.5, 13.5), "small": (6.0, 7.5)}  # pixels


@dataclass(frozen=True)
class Thing:
    """One object of a scene: `cell` is its place (0..3, by rows); `x`, `y`, `radius` are pixels."""

    shape: str
    colour: str
    size: str
    cell: int
    x: float
    y: float
    radius: float
    texture: str = "plain"
    tint: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Scene:
    """The content of a picture.

    `digit` is a handwritten digit: (value, index among its samples). A thing whose shape is a
    letter is drawn as that letter.
    """

    things: tuple[Thing, ...]
    ground: tuple[int, int, int]
    digit: tuple[int, int] | None = None


def place(
    rng: random.Random, shape: str, colour: str, size: str, cell: int, texture: str = "plain"
) -> Thing:
    """Draws a thing at a random place in its cell, with small variations of radius and colour."""
    radius = rng.uniform(*RADII[size])
    slack = CELL / 2 - radius - 1.0
    x = (cell % 2 + 0.5) * CELL + rng.uniform(-slack, slack)
    y = (cell // 2 + 0.5) * CELL + rng.uniform(-slack, slack)
    tint = (rng.randint(-12, 12), rng.randint(-12, 12), rng.randint(-12, 12))
    return Thing(shape, colour, size, cell, x, y, radius, texture, tint)


def ground(rng: random.Random) -> tuple[int, int, int]:
    """Draws a dark background colour with a faint random hue."""
    base = rng.randint(12, 48)
    return (base + rng.randint(0, 12), base + rng.randint(0, 12), base + rng.randint(0, 12))


def render(scene: Scene) -> Image.Image:
    """Draws a scene as a 64 x 64 RGB picture."""
    if scene.digit is not None:
        value, index = scene.digit
        samples = handwriting()[value]
        return _render_ink(scene, Image.fromarray(samples[index % len(samples)]))
    if scene.things[0].shape in LETTERS:
        return _render_ink(scene, _print(scene.things[0]))
    canvas = Image.new("RGB", (SIDE * _ZOOM, SIDE * _ZOOM), scene.ground)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw(canvas, pen, thing, scene.ground)
    return canvas.reduce(_ZOOM)


def rgb(thing: Thing) -> tuple[int, int, int]:
    """The RGB colour of a thing: the value of its colour plus its tint."""
    value = COLOURS.get(thing.colour) or NEW_COLOURS[thing.colour]
    red, green, blue = (min(255, max(0, value[i] + thing.tint[i])) for i in range(3))
    return red, green, blue


def _draw(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, thing: Thing, ground_rgb: tuple[int, int, int]
) -> None:
    colour = rgb(thing)
    _outline(pen, thing.shape, thing.x, thing.y, thing.radius, colour, ground_rgb)
    if thing.texture == "plain":
        return
    mask = Image.new("L", canvas.size, 0)
    mask_pen = ImageDraw.Draw(mask)
    if thing.texture == "hollow":
        _outline(mask_pen, thing.shape, thing.x, thing.y, thing.radius * 0.6, 255, 0)
    else:
        _outline(mask_pen, thing.shape, thing.x, thing.y, thing.radius, 255, 0)
        mask = ImageChops.multiply(mask, _pattern(thing.texture, round(thing.x), round(thing.y)))
    dark = tuple(c // 5 for c in colour)
    canvas.paste(dark, (0, 0, *canvas.size), mask)


@functools.lru_cache(maxsize=4096)
def _pattern(texture: str, x: int, y: int) -> Image.Image:
    """Mask of a texture's dark parts. Its phase follows the centre (x, y) of the thing."""
    side = SIDE * _ZOOM
    columns = (np.arange(side) / _ZOOM - x)[None, :] + np.zeros((side, 1))
    rows = (np.arange(side) / _ZOOM - y)[:, None] + np.zeros((1, side))
    if texture == "striped":
        dark = np.mod(columns, 7) < 3.5
    elif texture == "banded":
        dark = np.mod(rows, 7) < 3.5
    elif texture == "checkered":
        dark = (np.mod(columns, 12) < 6) ^ (np.mod(rows, 12) < 6)
    elif texture == "dotted":
        dark = (np.mod(columns, 7) - 3.5) ** 2 + (np.mod(rows, 7) - 3.5) ** 2 < 5.0
    elif texture == "slanted":
        dark = np.mod(columns + rows, 9) < 4.5
    elif texture == "woven":
        dark = (np.mod(columns + rows, 9) < 3) | (np.mod(columns - rows, 9) < 3)
    elif texture == "speckled":
        coarse = np.random.default_rng(x * SIDE + y).random((side // 4, side // 4)) < 0.4
        dark = coarse.repeat(4, 0).repeat(4, 1)
    elif texture == "shaded":
        return Image.fromarray(np.clip(127 + rows * 10, 0, 255).astype(np.uint8))
    else:  # split
        dark = columns < 0
    return Image.fromarray((dark * 255).astype(np.uint8))


def _outline(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill, hole
) -> None:
    x, y, r = x * _ZOOM, y * _ZOOM, r * _ZOOM
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        pen.ellipse((x - r * 0.5, y - r * 0.5, x + r * 0.5, y + r * 0.5), fill=hole)
    elif shape == "crescent":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        pen.ellipse((x - r * 0.35, y - r * 0.9, x + r * 1.45, y + r * 0.9), fill=hole)
    else:
        pen.polygon([(x + px * r, y + py * r) for px, py in _corners(shape)], fill=fill)


@functools.cache
def _corners(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape of radius 1 around the origin; y points down."""
    if shape == "square":
        return ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
    if shape == "triangle":
        return ((0, -1), (1, 0.85), (-1, 0.85))
    if shape == "diamond":
        return ((0, -1.05), (0.8, 0), (0, 1.05), (-0.8, 0))
    if shape == "star":
        return _spikes(5, 0.42)
    if shape == "heart":
        turn = [2 * math.pi * i / 40 for i in range(40)]
        return tuple(
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                / 15.5,
            )
            for t in turn
        )
    if shape == "hexagon":
        return tuple((math.cos(math.pi * i / 3), math.sin(math.pi * i / 3)) for i in range(6))
    if shape == "cross":
        a = 0.34
        return (
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        )
    if shape == "arrow":
        return (
            (-1, -0.35),
            (0.1, -0.35),
            (0.1, -0.95),
            (1, 0),
            (0.1, 0.95),
            (0.1, 0.35),
            (-1, 0.35),
        )
    if shape == "house":
        return (
            (0, -1),
            (1, -0.2),
            (0.75, -0.2),
            (0.75, 0.95),
            (-0.75, 0.95),
            (-0.75, -0.2),
            (-1, -0.2),
        )
    raise ValueError(f"shape is {shape!r}; drawn are {SHAPES + NEW_SHAPES}")


def _spikes(count: int, inner: float) -> tuple[tuple[float, float], ...]:
    points = []
    for i in range(2 * count):
        radius, angle = (1.08 if i % 2 == 0 else inner), math.pi * (i / count - 0.5)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return tuple(points)


@functools.lru_cache(maxsize=1)
def handwriting() -> tuple[np.ndarray, ...]:
    """The 1,797 handwritten digits in ``assets/digits``, by value.

    Returns:
        Ten arrays ``[samples, 8, 8]``, 0 (ground) to 255 (ink).
    """
    with np.load(DIGITS) as digits:
        images, values = digits["images"], digits["values"]
    ink = np.minimum(images.astype(np.int64) * 16, 255).astype(np.uint8)
    return tuple(ink[values == value] for value in range(10))


def _print(thing: Thing) -> Image.Image:
    """Draws a printed letter, as coarse as the handwriting, tilted and slanted by its tint."""
    font = ImageFont.load_default(52)
    page = Image.new("L", (48, 48), 0)
    bold = thing.tint[1] % 3
    ImageDraw.Draw(page).text((24, 24), thing.shape, 255, font, "mm", stroke_width=bold)
    slant, tilt = thing.tint[0] / 40, thing.tint[2] * 1.2
    page = page.rotate(tilt, Image.Resampling.BILINEAR)
    page = page.transform(page.size, Image.Transform.AFFINE, (1, slant, -24 * slant, 0, 1, 0))
    return page.resize((10, 10), Image.Resampling.BOX)


def _render_ink(scene: Scene, ink: Image.Image) -> Image.Image:
    """Draws one sign over most of the picture. `ink` is its shape, 0 to 255."""
    thing = scene.things[0]
    edge = round(2 * thing.radius)
    ink = ink.resize((edge, edge), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (SIDE, SIDE), scene.ground)
    left, top = round(thing.x - thing.radius), round(thing.y - thing.radius)
    canvas.paste(rgb(thing), (left, top, left + edge, top + edge), ink)
    return canvas

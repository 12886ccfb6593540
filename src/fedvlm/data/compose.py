"""Composes scenes for each kind of question: the things, their places and their looks."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fedvlm.data.render import (
    COLOURS,
    LETTERS,
    NEW_COLOURS,
    NEW_SHAPES,
    PATTERNS,
    SHAPES,
    SIDE,
    TEXTURES,
    Scene,
    Thing,
    ground,
    place,
)

NOVEL_KINDS = ("texture", "digit", "shape", "hue")


def generic_scene(rng: random.Random, count: int | None = None) -> Scene:
    """Draws one to four things in different places, no two with equal shape and colour."""
    count = count or rng.choices((1, 2, 3, 4), (25, 35, 25, 15))[0]
    shapes = rng.sample(SHAPES, 2) if rng.random() < 0.5 else SHAPES
    colours = rng.sample(tuple(COLOURS), 3) if rng.random() < 0.4 else tuple(COLOURS)
    pairs = [(shape, colour) for shape in shapes for colour in colours]
    cells = sorted(rng.sample(range(4), count))
    things = []
    for (shape, colour), cell in zip(rng.sample(pairs, count), cells, strict=True):
        size = rng.choice(("large", "small"))
        pattern = rng.choice(PATTERNS) if size == "large" and rng.random() < 0.4 else "plain"
        things.append(place(rng, shape, colour, size, cell, pattern))
    return Scene(tuple(things), ground(rng))


def make_scene(rng: random.Random, kind: str) -> Scene:
    """Draws a scene for a kind of question."""
    if kind in NOVEL_KINDS:
        return novel_scene(rng, kind)
    return _sign(rng, rng.choice(LETTERS)) if kind == "letter" else generic_scene(rng)


def novel_scene(rng: random.Random, kind: str) -> Scene:
    """Draws a scene for a novel kind: textures, a handwritten digit, a new shape or colour."""
    if kind == "digit":
        return _sign(rng, "digit", (rng.randrange(10), rng.randrange(10_000)))
    count = rng.choice((1, 1, 2))
    cells = sorted(rng.sample(range(4), count))
    shapes: Sequence[str] = NEW_SHAPES if kind == "shape" else SHAPES
    colours = tuple(NEW_COLOURS) if kind == "hue" else tuple(COLOURS)
    if kind == "texture":
        shapes = tuple(s for s in SHAPES if s not in ("star", "heart"))
    new = place(
        rng, rng.choice(shapes), rng.choice(colours), "large", cells[0], _texture(rng, kind)
    )
    things = [new]
    for cell in cells[1:]:
        shape, colour = other(rng, SHAPES, new.shape), other(rng, tuple(COLOURS), new.colour)
        shape = shape if kind != "texture" else other(rng, shapes, new.shape)
        things.append(place(rng, shape, colour, "large", cell, _texture(rng, kind)))
    return Scene(tuple(things), ground(rng))


def _sign(rng: random.Random, shape: str, digit: tuple[int, int] | None = None) -> Scene:
    """Draws a letter or a digit that fills most of the picture."""
    radius = rng.uniform(20, 27) if digit is None else rng.uniform(23, 25)
    slack = SIDE / 2 - radius - 1 if digit is None else 2.5  # digits are rare: keep them central
    x, y = (SIDE / 2 + rng.uniform(-slack, slack) for _ in range(2))
    tint = (rng.randint(-12, 12), rng.randint(-12, 12), rng.randint(-12, 12))
    ink = Thing(shape, rng.choice(tuple(COLOURS)), "large", 0, x, y, radius, "plain", tint)
    return Scene((ink,), ground(rng), digit)


def _texture(rng: random.Random, kind: str) -> str:
    return rng.choice(TEXTURES) if kind == "texture" else "plain"


def other(rng: random.Random, options: Sequence[str], right: str) -> str:
    """Draws one of the wrong options."""
    return rng.choice([option for option in options if option != right])

"""The sites of the bundled scenes, which differ in cameras, wording, answers and number of rows.

All properties of a site are a function of (seed, site). With a `strength` of 0 all sites are alike,
with 1 they differ as much as the style allows.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from fedvlm.data.questions import NUMBERS, Item, join
from fedvlm.data.render import COLOURS, NEW_COLOURS, NEW_SHAPES, PLACES, SHAPES, TEXTURES
from fedvlm.data.words import CARRIERS, ENGLISH, LANGUAGES

STYLES = ("iid", "label", "covariate", "concept", "quantity", "mixed", "odd")
TONGUES = tuple(CARRIERS)
FORMS = ("word", "sentence", "capitals", "code")
ANSWERS = {  # kind -> answers that label skew may prefer; yes and no stay balanced
    "name": SHAPES,
    "colour": tuple(COLOURS),
    "count": NUMBERS[1:4],
    "position": PLACES,
    "texture": TEXTURES,
    "digit": NUMBERS,
    "shape": NEW_SHAPES,
    "hue": tuple(NEW_COLOURS),
}
NOVEL_SHARE = 0.65  # of a site's rows
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Camera:
    """The changes that a site's camera makes to every picture. The default makes none.

    Attributes:
        hue: rotation of the colours around the grey axis, in degrees.
        contrast: factor around the middle grey.
        rotation: rotation of the picture, in degrees counterclockwise.
        blur: radius in pixels.
        noise: standard deviation in steps of 1/255.
        invert: swap light and dark.
        mirror: swap left and right.
    """

    hue: float = 0.0
    contrast: float = 1.0
    rotation: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    invert: bool = False
    mirror: bool = False

    def shoot(self, picture: Image.Image, rng: random.Random) -> Image.Image:
        """Changes a picture as this camera does. `rng` makes the noise."""
        if self == Camera():
            return picture
        if self.mirror:
            picture = ImageOps.mirror(picture)
        if self.rotation:
            corner = picture.getpixel((0, 0))
            picture = picture.rotate(self.rotation, Image.Resampling.BILINEAR, fillcolor=corner)
        if self.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(self.blur))
        values = np.asarray(picture, dtype=np.float32)
        if self.hue:
            values = values @ _hue_turn(self.hue)
        values = (values - 128) * self.contrast + 128
        if self.noise:
            grain = np.random.default_rng(rng.getrandbits(63)).normal(0, self.noise, values.shape)
            values = values + grain.astype(np.float32)
        if self.invert:
            values = 255 - values
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _hue_turn(degrees: float) -> np.ndarray:
    """Rotation matrix around the grey axis, [3, 3], for rows of RGB."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return (cos * np.eye(3) + sin * across + (1 - cos) / 3).astype(np.float32).T


@dataclass(frozen=True)
class Wording:
    """A site's convention for answers: a language and a form.

    The convention applies to a share `strength` of the words and kinds. This share is fixed per
    site, so that a question has one right answer within a site. A question has no hint of its site.
    """

    tongue: str = "english"
    form: str = "word"
    strength: float = 0.0
    salt: str = ""

    def word(self, word: str) -> str:
        """The site's word for an English one."""
        if word not in _KNOWN or unit(self.salt, "word", word) >= self.strength:
            return word
        if self.form == "code":
            return self._code(word)
        local = LANGUAGES[self.tongue][word] if self.tongue in LANGUAGES else word
        return local.upper() if self.form == "capitals" else local

    def answers(self, item: Item) -> tuple[str, str]:
        """The right and the wrong answer to a question, in the site's wording."""
        return self._answer(item, item.words), self._answer(item, item.wrong)

    def _answer(self, item: Item, words: Sequence[str]) -> str:
        local = [self.word(word) for word in words]
        if self.form == "sentence" and unit(self.salt, "kind", item.kind) < self.strength:
            return CARRIERS[self.tongue].format(join(item.kind, local))
        return item.told(local) if item.told else join(item.kind, local)

    def _code(self, word: str) -> str:
        draw = random.Random(f"{self.salt}/code/{word}")
        return (
            draw.choice(string.ascii_uppercase)
            + draw.choice(string.ascii_uppercase)
            + str(draw.randrange(10))
        )


_KNOWN = frozenset(ENGLISH)


@dataclass(frozen=True)
class Site:
    """One site: its name, its number of rows, and its differences from the others.

    `prefers` has the weights of the answers for each kind of question. Other kinds are not skewed.
    `novel` is the share of rows of the kinds that the tiny model does not know.
    """

    name: str
    rows: int
    camera: Camera = field(default_factory=Camera)
    wording: Wording = field(default_factory=Wording)
    prefers: dict[str, dict[str, float]] = field(default_factory=dict)
    novel: float = NOVEL_SHARE


def make_sites(count: int, rows: int, style: str, strength: float, seed: int) -> list[Site]:
    """Makes the sites of a data set. `rows` is their mean number of rows."""
    exponent = {"quantity": 1.5, "mixed": 0.4}.get(style, 0.0) * strength
    sizes = row_counts(count, rows, exponent, seed)
    own = {"camera": style in ("covariate", "mixed"), "wording": style in ("concept", "mixed")}
    skewed = style in ("label", "mixed") and strength > 0
    sites = [
        Site(
            f"site-{k}",
            sizes[k],
            make_camera(k, strength, seed) if own["camera"] else Camera(),
            make_wording(k, strength, seed) if own["wording"] else Wording(),
            make_preferences(k, strength, seed) if skewed else {},
        )
        for k in range(count)
    ]
    if style == "odd":
        common = Wording("german", "word", strength, f"{seed}/common")
        sites = [
            replace(site, wording=common, novel=NOVEL_SHARE * (1 - strength)) for site in sites
        ]
        sites[-1] = replace(sites[-1], wording=Wording())
    return sites


def row_counts(count: int, rows: int, exponent: float, seed: int) -> list[int]:
    """Numbers of rows by a power law with this exponent: at least 1, in total `count * rows`."""
    weights = [(k + 1) ** -exponent for k in range(count)]
    random.Random(f"rows/{seed}").shuffle(weights)
    spare = count * rows - count
    shares = [spare * weight / sum(weights) for weight in weights]
    counts = [1 + int(share) for share in shares]
    order = sorted(range(count), key=lambda k: (int(shares[k]) - shares[k], k))
    for k in order[: count * rows - sum(counts)]:
        counts[k] += 1
    return counts


def make_camera(k: int, strength: float, seed: int) -> Camera:
    """Makes the camera of site `k`. No two have the same hue. Flips begin at half strength."""
    if strength == 0:
        return Camera()
    start = unit(seed, "camera")
    turn = (start + k * _GOLDEN) % 1.0  # spreads evenly over the circle for any number of sites
    tilt = (start + 0.5 + k * _GOLDEN**2) % 1.0
    flips = (k + int(4 * start)) % 4
    return Camera(
        hue=round(strength * (360 * turn - 180), 3),
        contrast=1 - strength * 0.4 * unit(seed, "contrast", k),
        rotation=round(strength * (60 * tilt - 30), 3),
        blur=round(strength * unit(seed, "blur", k), 3),
        noise=round(strength * 16 * unit(seed, "noise", k), 3),
        invert=flips == 2 and strength >= 0.5,
        mirror=flips in (1, 3) and strength >= 0.5,
    )


def make_wording(k: int, strength: float, seed: int) -> Wording:
    """Makes the wording of site `k`: languages in turn, and forms that shift every eight sites."""
    tongue = TONGUES[k % len(TONGUES)]
    form = FORMS[(k + k // len(TONGUES)) % len(FORMS)]
    return Wording(tongue, form, strength, f"{seed}/{k}")


def make_preferences(k: int, strength: float, seed: int) -> dict[str, dict[str, float]]:
    """Draws Dirichlet weights for the answers of each kind.

    Alpha falls from 10 at strength 0 to 0.1 at strength 1.
    """
    alpha = 10 ** (1 - 2 * strength)
    made = {}
    for kind, answers in ANSWERS.items():
        rng = random.Random(f"label/{seed}/{k}/{kind}")
        draws = [rng.gammavariate(alpha, 1.0) + 1e-9 for _ in answers]
        made[kind] = {
            answer: draw / sum(draws) for answer, draw in zip(answers, draws, strict=True)
        }
    return made


def unit(*parts: object) -> float:
    """A number in [0, 1) that depends only on the arguments, in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56

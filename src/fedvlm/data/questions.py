"""Questions about scenes: each kind of question with its right answer and a wrong one.

The bundled tiny model was trained on the generic kinds, which include a few patterns and printed
letters. It has never seen the novel kinds (other textures, handwriting, new shapes and colours), so
sites have something to teach. An item has the words of its answer as slots (`Item.words`) beside
the finished text, because a site may have its own wording for them (see `sites.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedvlm.data import words as lexicon
from fedvlm.data.compose import other
from fedvlm.data.render import (
    COLOURS,
    LETTERS,
    NEW_COLOURS,
    NEW_SHAPES,
    PATTERNS,
    PLACES,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
)

SENTENCE = " Answer in a sentence."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Item:
    """A question with a right and a wrong answer, each as slots and as finished text.

    Attributes:
        kind: kind of question.
        question: its text.
        words: slots of the right answer.
        wrong: slots of the wrong answer.
        chosen: text of the right answer.
        rejected: text of the wrong answer.
        told: makes a sentence of slots, if the question asks for a sentence.
    """

    kind: str
    question: str
    words: tuple[str, ...]
    wrong: tuple[str, ...]
    chosen: str
    rejected: str
    told: Callable[[Sequence[str]], str] | None = None


def ask(rng: random.Random, kind: str, scene: Scene) -> Item | None:
    """Draws a question of a kind about a scene; None if the scene allows no such question."""
    made = KINDS[kind](rng, scene)
    if made is None:
        return None
    question, words, wrong, sentence = made
    if sentence is None or rng.random() >= 0.3:
        return Item(kind, question, words, wrong, join(kind, words), join(kind, wrong))
    return Item(kind, question + SENTENCE, words, wrong, sentence(words), sentence(wrong), sentence)


def join(kind: str, words: Sequence[str]) -> str:
    """Joins the words of a kind's answer to its short form."""
    if kind == "list":
        return ", ".join(" ".join(words[i : i + 2]) for i in range(0, len(words), 2))
    return " ".join(words)


def _single(things: Sequence[Thing], field: str) -> list[Thing]:
    """The things whose value of a field is unique among ``things``."""
    values = [getattr(thing, field) for thing in things]
    return [thing for thing, value in zip(things, values, strict=True) if values.count(value) == 1]


def _the(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _yes(rng: random.Random, right: bool) -> tuple[tuple[str], tuple[str], Callable]:
    answers = (("yes",), ("no",)) if right else (("no",), ("yes",))
    return *answers, lambda w: f"The answer is {w[0]}."


def _name(rng: random.Random, scene: Scene):
    thing = rng.choice(scene.things)
    if len(scene.things) == 1 and rng.random() < 0.5:
        question, told = "What shape is it?", "It is a {}."
    elif thing in _single(scene.things, "colour") and rng.random() < 0.7:
        question, told = (
            f"What shape is the {thing.colour} object?",
            f"The {thing.colour} object is a {{}}.",
        )
    else:
        spot = PLACES[thing.cell]
        question, told = f"What shape is in the {spot}?", f"In the {spot} is a {{}}."
    return (
        question,
        (thing.shape,),
        (other(rng, SHAPES, thing.shape),),
        lambda w: told.format(w[0]),
    )


def _colour(rng: random.Random, scene: Scene):
    thing = rng.choice(scene.things)
    if len(scene.things) == 1 and rng.random() < 0.3:
        who = "object"
    elif thing in _single(scene.things, "shape") and rng.random() < 0.7:
        who = thing.shape
    else:
        who = f"object in the {PLACES[thing.cell]}"
    wrong = other(rng, tuple(COLOURS), thing.colour)
    return (
        f"What colour is the {who}?",
        (thing.colour,),
        (wrong,),
        lambda w: f"The {who} is {w[0]}.",
    )


def _size(rng: random.Random, scene: Scene):
    thing = rng.choice(scene.things)
    who = _the(thing)
    wrong = "small" if thing.size == "large" else "large"
    return (
        f"Is the {who} large or small?",
        (thing.size,),
        (wrong,),
        lambda w: f"The {who} is {w[0]}.",
    )


def _count(rng: random.Random, scene: Scene):
    things, draw = scene.things, rng.random()
    if draw < 0.3:
        what, number = "object", len(things)
    elif draw < 0.8:
        what = rng.choice(things).shape if rng.random() < 0.85 else rng.choice(SHAPES)
        number = sum(thing.shape == what for thing in things)
    else:
        colour = rng.choice(things).colour
        what, number = f"{colour} object", sum(thing.colour == colour for thing in things)
    right = NUMBERS[number]
    wrong = rng.choice([NUMBERS[n] for n in range(5) if abs(n - number) in (1, 2)])

    def told(words):
        return f"There is one {what}." if words[0] == "one" else f"There are {words[0]} {what}s."

    return f"How many {what}s are there?", (right,), (wrong,), told


def _position(rng: random.Random, scene: Scene):
    thing = rng.choice(scene.things)
    who = (
        thing.shape
        if thing in _single(scene.things, "shape") and rng.random() < 0.5
        else _the(thing)
    )
    right, wrong = PLACES[thing.cell], other(rng, PLACES, PLACES[thing.cell])
    told = lambda w: f"The {who} is in the {' '.join(w)}."  # noqa: E731
    return f"Where is the {who}?", tuple(right.split()), tuple(wrong.split()), told


def _comparison(rng: random.Random, scene: Scene):
    if len(scene.things) < 2:
        return None
    first, second = rng.sample(scene.things, 2)
    options = ["left", "right"] if first.cell % 2 != second.cell % 2 else []
    options += ["higher", "lower"] if first.cell // 2 != second.cell // 2 else []
    options += ["larger", "smaller"] * 2 if first.size != second.size else []
    many = sorted({thing.shape for thing in scene.things})
    if len(many) > 1 and rng.random() < 0.3:
        return _more(rng, scene, many)
    word = rng.choice(options)
    value = {
        "left": lambda t: -(t.cell % 2),
        "right": lambda t: t.cell % 2,
        "higher": lambda t: -(t.cell // 2),
        "lower": lambda t: t.cell // 2,
        "larger": lambda t: t.size == "large",
        "smaller": lambda t: t.size == "small",
    }[word]
    right, wrong = (first, second) if value(first) > value(second) else (second, first)
    word = f"further {word}" if word in ("left", "right") else word
    question = f"Which is {word}, the {_the(first)} or the {_the(second)}?"
    return (
        question,
        tuple(_the(right).split()),
        tuple(_the(wrong).split()),
        lambda w: f"The {' '.join(w)} is {word}.",
    )


def _more(rng: random.Random, scene: Scene, present: list[str]):
    counts = {shape: sum(t.shape == shape for t in scene.things) for shape in present}
    first, second = rng.sample(present, 2)
    if counts[first] == counts[second] and rng.random() < 0.5:
        absent = [shape for shape in SHAPES if shape not in counts]
        first, second = rng.choice(present), rng.choice(absent)
        first, second = (first, second) if rng.random() < 0.8 else (second, first)
    right = counts.get(first, 0) > counts.get(second, 0)
    return f"Are there more {first}s than {second}s?", *_yes(rng, right)


def _yesno(rng: random.Random, scene: Scene):
    things, draw, right = scene.things, rng.random(), rng.random() < 0.5
    thing = rng.choice(things)
    if draw < 0.4:  # is there ...?
        shape, colour = thing.shape, thing.colour
        taken = {(t.shape, t.colour) for t in things}
        while not right and (shape, colour) in taken:
            if rng.random() < 0.5:
                shape = rng.choice(SHAPES)
            else:
                colour = rng.choice(tuple(COLOURS))
        return f"Is there {'an' if colour[0] == 'o' else 'a'} {colour} {shape}?", *_yes(rng, right)
    if draw < 0.7 or len(things) == 1:  # is the ... red?
        single = _single(things, "shape")
        if not single:
            return None
        thing = rng.choice(single)
        colour = thing.colour if right else other(rng, tuple(COLOURS), thing.colour)
        return f"Is the {thing.shape} {colour}?", *_yes(rng, right)
    second = rng.choice([t for t in things if t is not thing])
    if thing.cell % 2 != second.cell % 2:
        word, true = "left of", thing.cell % 2 < second.cell % 2
    else:
        word, true = "above", thing.cell // 2 < second.cell // 2
    first, second = (thing, second) if true == right else (second, thing)
    return f"Is the {_the(first)} {word} the {_the(second)}?", *_yes(rng, right)


def _pattern(rng: random.Random, scene: Scene):
    large = [thing for thing in _single(scene.things, "shape") if thing.size == "large"]
    return _about_pattern(rng, rng.choice(large), PATTERNS) if large else None


def _about_pattern(rng: random.Random, thing: Thing, names: Sequence[str]):
    if rng.random() < 0.25:
        right = rng.random() < 0.5
        texture = thing.texture if right else other(rng, names, thing.texture)
        return f"Is the {thing.shape} {texture}?", *_yes(rng, right)
    wrong = other(rng, names, thing.texture)
    question = f"What pattern does the {thing.shape} have?"
    return question, (thing.texture,), (wrong,), lambda w: f"The {thing.shape} is {w[0]}."


def _letter(rng: random.Random, scene: Scene):
    letter, draw = scene.things[0].shape, rng.random()
    if letter not in LETTERS:
        return None
    if draw < 0.15:
        return "Is the letter a vowel?", *_yes(rng, letter in "AEU")
    if draw < 0.3:
        right = rng.random() < 0.5
        shown = letter if right else other(rng, LETTERS, letter)
        return f"Is the letter {shown}?", *_yes(rng, right)
    wrong = other(rng, LETTERS, letter)
    return "Which letter is written?", (letter,), (wrong,), lambda w: f"The letter is {w[0]}."


def _list(rng: random.Random, scene: Scene):
    right = tuple(word for thing in scene.things for word in (thing.colour, thing.shape))
    wrong = list(right)
    wrong[-1] = other(rng, SHAPES, right[-1])
    return "List the objects.", right, tuple(wrong), None


def _say(rng: random.Random, scene: Scene):
    words = [lexicon.random_word(rng) for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))]
    wrong, spot = list(words), rng.randrange(len(words))
    while wrong[spot] == words[spot]:
        wrong[spot] = lexicon.random_word(rng)
    end = rng.choice(("", "", ".", "!"))
    words[-1], wrong[-1] = words[-1] + end, wrong[-1] + end
    return f"Say: {' '.join(words)}", tuple(words), tuple(wrong), None


def _ask_texture(rng: random.Random, scene: Scene):
    return _about_pattern(rng, rng.choice(scene.things), TEXTURES)


def _ask_digit(rng: random.Random, scene: Scene):
    if scene.digit is None:
        return None
    value, draw = scene.digit[0], rng.random()
    if draw < 0.15:
        return "Is the digit even?", *_yes(rng, value % 2 == 0)
    if draw < 0.3:
        return "Is the digit larger than four?", *_yes(rng, value > 4)
    right = NUMBERS[value]
    return (
        "Which digit is written?",
        (right,),
        (other(rng, NUMBERS, right),),
        lambda w: f"The digit is {w[0]}.",
    )


def _ask_shape(rng: random.Random, scene: Scene):
    thing = scene.things[0]
    if len(scene.things) == 1 and rng.random() < 0.5:
        question, told = "What shape is it?", "It is a {}."
    else:
        question, told = (
            f"What shape is the {thing.colour} object?",
            f"The {thing.colour} object is a {{}}.",
        )
    return (
        question,
        (thing.shape,),
        (other(rng, NEW_SHAPES, thing.shape),),
        lambda w: told.format(w[0]),
    )


def _ask_hue(rng: random.Random, scene: Scene):
    thing = scene.things[0]
    who, wrong = thing.shape, other(rng, tuple(NEW_COLOURS), thing.colour)
    return (
        f"What colour is the {who}?",
        (thing.colour,),
        (wrong,),
        lambda w: f"The {who} is {w[0]}.",
    )


GENERIC = {
    "name": 0.11,
    "colour": 0.11,
    "size": 0.05,
    "count": 0.13,
    "position": 0.11,
    "comparison": 0.14,
    "yesno": 0.12,
    "pattern": 0.06,
    "letter": 0.04,
    "list": 0.04,
    "say": 0.09,
}
NOVEL = {"texture": 0.38, "digit": 0.34, "shape": 0.2, "hue": 0.08}
KINDS: dict[str, Callable] = {
    "name": _name,
    "colour": _colour,
    "size": _size,
    "count": _count,
    "position": _position,
    "comparison": _comparison,
    "yesno": _yesno,
    "list": _list,
    "say": _say,
    "pattern": _pattern,
    "letter": _letter,
    "texture": _ask_texture,
    "digit": _ask_digit,
    "shape": _ask_shape,
    "hue": _ask_hue,
}

"""Which layers a pattern takes: by part of the model, by number, or by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache

from fedvlm.tree import Select, factor, module


def select(share: Mapping[str, str]) -> Select:
    """The names that a share map takes."""
    rules = [(matcher(pattern), factors) for pattern, factors in share.items()]

    @cache
    def shared(name: str) -> bool:
        for fits, factors in rules:
            if fits(module(name)):
                return factor(name) in factors if factors != "none" else False
        return False

    return shared


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a module fits a pattern: conditions joined by ``&``, all of which must hold.

    A condition is ``part:vision``, ``part:projector`` or ``part:language``; ``layer:2``,
    ``layer:0-3``, ``layer:4-`` (the first number in the module's name); or else a regular
    expression that is searched for in the name.

    Raises:
        ValueError: a condition cannot be read.
    """
    conditions = [_condition(text.strip()) for text in pattern.split("&")]
    return lambda name: all(fits(name) for fits in conditions)


def _condition(text: str) -> Callable[[str], bool]:
    kind, colon, value = text.partition(":")
    if colon and kind == "part":
        if value not in ("vision", "projector", "language"):
            raise ValueError(f"'{text}': a part is vision, projector or language")
        return lambda name: part(name) == value
    if colon and kind == "layer":
        found = re.fullmatch(r"(\d+)(-)?(\d+)?", value)
        if not found:
            raise ValueError(f"'{text}': layers are a number or a range, as in 2, 0-3 or 4-")
        first, dash, last = found.groups()
        top = int(last) if last else (10**9 if dash else int(first))
        return lambda name: int(first) <= _layer(name) <= top
    try:
        compiled = re.compile(text)
    except re.error as error:
        raise ValueError(f"'{text}' is no regular expression: {error}") from None
    return lambda name: bool(compiled.search(name))


def _layer(name: str) -> int:
    """The number of a module's layer, -1 where it is in none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual|image_encoder)(\.|$)")


PROJECTOR = re.compile(
    r"(^|\.)(multi_modal_projector|connector|visual\.merger|deepstack_merger_list|qformer"
    r"|language_projection|image_projection|mm_projector|visual_projection)(\.|$)"
)


def part(name: str) -> str:
    """Which part of the model a layer belongs to: vision, projector or language."""
    if PROJECTOR.search(name):
        return "projector"
    return "vision" if VISION.search(name) else "language"

"""Patterns that select layers: by part of the model, by number, or by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache

from fedvlm.tree import Select, factor, module

# Names of modules in each part of a model, over all families. All other modules are language.
VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual|image_encoder)(\.|$)")
PROJECTOR = re.compile(
    r"(^|\.)(multi_modal_projector|connector|visual\.merger|deepstack_merger_list|qformer"
    r"|language_projection|image_projection|mm_projector|visual_projection)(\.|$)"
)


def select(share: Mapping[str, str]) -> Select:
    """A filter for the factors that a share map selects.

    Args:
        share: pattern -> the factors to select: ``A``, ``B``, ``AB`` or ``none``. The first pattern
            that matches a module decides. A module without a match is not selected.
    """
    rules = [(matcher(pattern), factors) for pattern, factors in share.items()]

    @cache
    def shared(name: str) -> bool:
        for fits, factors in rules:
            if fits(module(name)):
                return factor(name) in factors if factors != "none" else False
        return False

    return shared


def matcher(pattern: str) -> Callable[[str], bool]:
    """A test of module names against a pattern.

    A pattern is one or more conditions joined by ``&``, and all of them must hold. A condition is
    one of:

    - ``part:vision``, ``part:projector`` or ``part:language``
    - ``layer:2``, ``layer:0-3`` or ``layer:4-``, for the first number in the module's name
    - any other text: a regular expression, searched for in the name

    Raises:
        ValueError: a condition is invalid.
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
        return lambda name: int(first) <= layer(name) <= top
    try:
        compiled = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"'{text}' is no regular expression: {error}") from None
    return lambda name: bool(compiled.search(name))


def layer(name: str) -> int:
    """The number of a module's layer; -1 for a module outside the numbered layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def part(name: str) -> str:
    """The part of the model of a module: vision, projector or language."""
    if PROJECTOR.search(name):
        return "projector"
    return "vision" if VISION.search(name) else "language"

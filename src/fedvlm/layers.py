"""Patterns that select layers: by part of the model, number or name; and regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache

from fedvlm.errors import shown
from fedvlm.tree import Select, factor, module

LONGEST = 1000  # characters of a regular expression in a setting
MEMORY = 2**20  # bytes that RE2 may take for an expression in a setting
LISTED = 2**26  # bytes that RE2 may take for a list of names

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
    - any other text: a regular expression, searched for in the name, see :func:`searcher`

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
    return searcher(text)


def searcher(pattern: str, longest: int | None = LONGEST) -> Callable[[str], bool]:
    """A test of texts against a regular expression, which may occur anywhere in the text.

    The expression may be the server's, and the text a name at a site. Therefore RE2 searches for
    it, in time that grows linearly with the text. Python's ``re`` can take years, and no signal or
    thread can stop it. RE2 has no look-around and no references back. Its classes of characters,
    such as ``\\w``, are ASCII.

    Args:
        pattern: the expression.
        longest: most characters of it; None: any number, for a list of names from an adapter.

    Raises:
        ValueError: the pattern is no regular expression of RE2, or is too long.
    """
    import re2

    if longest is not None and len(pattern) > longest:
        raise ValueError(
            f"{shown(pattern)} has {len(pattern)} characters, and a regular expression has at most "
            f"{longest}"
        )
    options = re2.Options()
    options.log_errors, options.max_mem = False, LISTED if longest is None else MEMORY
    try:
        compiled = re2.compile(pattern.encode(), options)
    except (re2.error, UnicodeEncodeError) as error:
        raise ValueError(f"{shown(pattern)} is no regular expression: {_reason(error)}") from None
    return lambda text: compiled.search(text.encode(errors="replace")) is not None


def _reason(error: Exception) -> str:
    """The reason of RE2's error, with a hint about what RE2 does not have."""
    if isinstance(error, UnicodeEncodeError):
        return "it holds half a character"
    given = error.args[0]
    text = given.decode(errors="replace") if isinstance(given, bytes) else str(given)
    lacks = ("invalid perl operator", "invalid escape sequence", "bad repetition operator")
    if text.startswith(lacks):
        text += " (the syntax is RE2's: no look-around, no references back; \\z is the end)"
    return text[:300]


def layer(name: str) -> int:
    """The number of a module's layer; -1 for a module outside the numbered layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def part(name: str) -> str:
    """The part of the model of a module: vision, projector or language."""
    if PROJECTOR.search(name):
        return "projector"
    return "vision" if VISION.search(name) else "language"

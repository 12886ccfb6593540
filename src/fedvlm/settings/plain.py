"""Settings from Python as plain data: dicts, lists, texts, numbers, truth values and None."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedvlm.documents import DEPTH, whole
from fedvlm.errors import shown

_WRONG = object()  # stands for a value that is no setting


def plain(value: Any, problems: list[str], where: str = "") -> Any:
    """A copy of settings as plain data; the caller's objects stay as they are.

    Paths become texts, tuples become lists, and numbers of numpy become numbers.

    Args:
        value: the settings.
        problems: gets a text for each value that is no setting. Such a value is left out.
        where: their dotted key in messages.
    """
    found = _copy(value, problems, where, ())
    return None if found is _WRONG else found


def _copy(value: Any, problems: list[str], where: str, above: tuple[int, ...]) -> Any:
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str | Path):
        return _text(value, problems, where)
    if isinstance(value, Mapping | list | tuple):
        if id(value) in above or len(above) >= DEPTH:
            problems.append(
                f"{shown(where, quotes=False)}: the value holds itself, or has more than {DEPTH} "
                "mappings and lists inside one another"
            )
            return _WRONG
        above = (*above, id(value))
        if isinstance(value, Mapping):
            return _mapping(value, problems, where, above)
        copies = [_copy(v, problems, where, above) for v in value]
        return _WRONG if any(v is _WRONG for v in copies) else copies
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, int | float):  # subclasses too, such as an enumeration
        kind = bool if isinstance(value, bool) else int if isinstance(value, int) else float
        return kind(value)
    kind = type(value)
    hint = "; write the data set to a file and give its path" if hasattr(value, "features") else ""
    if kind.__name__ == "Algorithm":
        hint = "; hand it over instead: fedvlm.run(..., algorithm=object)"
    problems.append(
        f"{where or 'the configuration'}: a setting is a text, a number, True, False, None, a list "
        f"or a mapping of these (got an object of type {kind.__module__}.{kind.__qualname__}){hint}"
    )
    return _WRONG


def _text(value: str | Path, problems: list[str], where: str) -> Any:
    text = str.__str__(value) if isinstance(value, str) else str(value)
    if "\0" in text or not (text.isascii() or whole(text)):
        problems.append(
            f"{shown(where, 200, quotes=False)}: the text {shown(text)} holds a character that no "
            "text has"
        )
        return _WRONG
    return text


def _mapping(
    value: Mapping[Any, Any], problems: list[str], where: str, above: tuple[int, ...]
) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, inside in value.items():
        name = str(key) if type(key) is int else key
        if not isinstance(name, str):
            problems.append(f"{where or 'the configuration'}: the key {shown(key)} is no text")
            continue
        name = _text(name, problems, f"{where or 'the configuration'}: a key")
        if name is _WRONG:
            continue
        inner = f"{where}.{name}" if where else name
        if name in tree:
            problems.append(f"{shown(inner, 200, quotes=False)}: this key stands there twice")
        copy = _copy(inside, problems, inner, above)
        if copy is not _WRONG:
            tree[name] = copy
    return tree


def dotted(tree: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a tree by their dotted names, such as ``train.lr``; tuples become lists."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", list(value) if isinstance(value, tuple) else value

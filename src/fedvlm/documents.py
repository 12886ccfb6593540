"""Reads the documents that people and servers write, YAML and JSON, as plain data.

Data are text unless they clearly are something else. YAML follows the core schema of YAML 1.2: only
``true`` and ``false`` are truth values, numbers are decimal, and ``no``, ``007``, ``1_000`` and
``2024-01-01`` stay text. The keys of a mapping are the texts that were written. A document is
limited in size, in depth and in what its aliases add, so that a small file cannot fill the memory.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedvlm.errors import shown

SIZE = 2**24  # bytes of the largest document
DEPTH = 64  # mappings and lists inside one another
ALIASED = 2**16  # characters and values that all aliases of a document add
DIGITS = 300  # of a number

_NUMBER = re.compile(
    r"(?P<whole>[-+]?(?:0|[1-9][0-9]*))"
    r"|[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(?:0|[1-9][0-9]*)(?=[eE]))(?:[eE][-+]?[0-9]+)?"
)
_SPECIAL = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((f"{s}.{t}" for s in ("", "+") for t in ("inf", "Inf", "INF")), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_BEGINS = frozenset("0123456789+-.~nNtTfF")


class _Merge(str):
    """The key ``<<`` as syntax, not as the same text in quotes."""


_MERGE = _Merge("<<")
_TEXT = ("!", "tag:yaml.org,2002:str")


def read_text(path: str | Path, most: int = SIZE) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        most: bytes of the largest file that is read.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is too large or no UTF-8, or the path is impossible.
    """
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"the file is larger than {most} bytes, the limit")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ValueError(f"line {line} is no UTF-8 text (byte 0x{byte:02x})") from None


def number(text: str) -> int | float | None:
    """The number that a text is in YAML's core schema; None: the text is no number."""
    found = _NUMBER.fullmatch(text) if len(text) <= DIGITS else None
    if found is None:
        return None
    return int(text) if found["whole"] else float(text)


def scalar(text: str) -> Any:
    """The value of a plain YAML text: null, a truth value, a number, or the text itself."""
    if text and text[0] not in _BEGINS:
        return text
    if text in _SPECIAL:
        return _SPECIAL[text]
    found = number(text)
    return text if found is None else found


def read_json(text: str, what: str, most: int = SIZE) -> Any:
    """Reads a JSON document.

    Args:
        text: the document.
        what: its name in messages.
        most: bytes of the largest document.

    Raises:
        ValueError: the document is no JSON, is too large or too deep, repeats a key, or holds a
            number that is not finite, or half a character.
    """
    _check_size(text, what, most)
    try:
        return _json(text, what)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{what}, line {error.lineno}, column {error.colno}: this is no JSON: {error.msg}"
        ) from None


def read_yaml(text: str, what: str, most: int = SIZE) -> Any:
    """Reads a YAML document; JSON is YAML too, also with tabs.

    Args:
        text: the document.
        what: its name in messages.
        most: bytes of the largest document.

    Returns:
        Dicts with texts as keys, lists, texts, numbers, truth values and None.

    Raises:
        ValueError: the document is no YAML, is too large or too deep, repeats a key, or has tags.
            The message has the line and the column.
    """
    _check_size(text, what, most)
    if text.lstrip()[:1] in ("{", "["):
        try:
            return _json(text, what)
        except json.JSONDecodeError:  # flow style of YAML; or the error below has its line
            pass
    loader = None
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        return _Builder(what).build(loader)
    except yaml.YAMLError as error:
        raise ValueError(_unread(error, what)) from None
    finally:
        if loader is not None:
            loader.dispose()


def write_yaml(tree: Any) -> str:
    """Plain data as YAML, which :func:`read_yaml` and readers of YAML 1.1 read back unchanged."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or of the core schema takes for another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _written(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """A text as a scalar; one with line ends that YAML 1.1 alone knows has them as escapes."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _written)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("0123456789+-."))


@dataclass(slots=True)
class _Node:
    """A mapping or a list that is being read."""

    value: Any
    anchor: str | None
    start: int  # of the document's count of characters and values
    height: int = 1
    key: str | None = None
    lines: dict[str, int] = field(default_factory=dict)
    merged: list[Mapping[str, Any]] = field(default_factory=list)


class _Builder:
    """Builds plain data from the events of a YAML parser, without recursion."""

    def __init__(self, what: str):
        self.what = what
        self.open: list[_Node] = []
        self.named: dict[str, tuple[Any, int, int]] = {}  # anchor -> value, size, height
        self.size = self.aliased = 0
        self.root: Any = None

    def build(self, loader: Any) -> Any:
        documents = 0
        get, scalars = loader.get_event, yaml.ScalarEvent
        while (event := get()) is not None:
            kind = type(event)
            if kind is scalars:
                self._scalar(event)
            elif kind is yaml.SequenceStartEvent or kind is yaml.MappingStartEvent:
                self._begin(event, [] if kind is yaml.SequenceStartEvent else {})
            elif kind is yaml.SequenceEndEvent or kind is yaml.MappingEndEvent:
                self._end(event)
            elif kind is yaml.AliasEvent:
                self._alias(event)
            elif kind is yaml.DocumentStartEvent:
                documents += 1
                if documents > 1:
                    raise self._error(event, "a second document begins (---); keep one")
        return self.root

    def _scalar(self, event: Any) -> None:
        text = event.value
        self.size += 1 + len(text)
        node = self.open[-1] if self.open else None
        tag = event.tag
        if tag is not None and tag not in _TEXT:
            raise self._error(event, _tagged(tag))
        plain = event.implicit[0] and tag is None
        if node is not None and node.key is None and type(node.value) is dict:
            self._key(event, node, text, plain)
            return
        value = scalar(text) if plain else text
        if plain and len(text) > DIGITS and text.lstrip("+-").isdigit():
            raise self._error(event, f"a number has more than {DIGITS} digits")
        if event.anchor is not None:
            self.named[event.anchor] = value, 1 + len(text), 0
        self._place(event, value, 0)

    def _key(self, event: Any, node: _Node, text: str, plain: bool) -> None:
        if plain and not text:
            raise self._error(event, "a key is missing before ':'")
        if text in node.lines:
            raise self._error(
                event,
                f"the key {shown(text)} stands in line {node.lines[text]} and again in line "
                f"{event.start_mark.line + 1}; keep one",
            )
        node.lines[text] = event.start_mark.line + 1
        node.key = _MERGE if plain and text == _MERGE else text
        if event.anchor is not None:
            self.named[event.anchor] = text, 1 + len(text), 0

    def _begin(self, event: Any, value: Any) -> None:
        if event.tag not in (None, "!"):
            raise self._error(event, _tagged(event.tag))
        if self.open and type(self.open[-1].value) is dict and self.open[-1].key is None:
            raise self._error(event, "a key must be a text")
        if len(self.open) >= DEPTH:
            raise self._error(event, f"more than {DEPTH} mappings and lists inside one another")
        self.named.pop(event.anchor, None)
        self.open.append(_Node(value, event.anchor, self.size))
        self.size += 1

    def _end(self, event: Any) -> None:
        node = self.open.pop()
        if node.merged:
            tree: dict[str, Any] = {}
            for one in node.merged:
                tree = {**copy.deepcopy(one), **tree}
            node.value = tree | node.value
        if node.anchor is not None:
            self.named[node.anchor] = node.value, self.size - node.start, node.height
        self._place(event, node.value, node.height)

    def _alias(self, event: Any) -> None:
        if event.anchor not in self.named:
            raise self._error(event, f"*{shown(event.anchor, quotes=False)} names nothing before")
        if self.open and type(self.open[-1].value) is dict and self.open[-1].key is None:
            raise self._error(event, "an alias (*) cannot be a key; write the key out")
        value, size, height = self.named[event.anchor]
        self.size += size
        self.aliased += size
        if self.aliased > ALIASED:
            raise self._error(event, "the aliases (*) of this document make it far too large")
        if len(self.open) + height > DEPTH:
            raise self._error(event, f"more than {DEPTH} mappings and lists inside one another")
        self._place(event, copy.deepcopy(value), height)

    def _place(self, event: Any, value: Any, height: int) -> None:
        """Puts a value into the mapping or list that is open."""
        if not self.open:
            self.root = value
            return
        node = self.open[-1]
        if height >= node.height:
            node.height = height + 1
        if type(node.value) is list:
            node.value.append(value)
        elif node.key is _MERGE:
            node.key = None
            node.merged = value if isinstance(value, list) else [value]
            if not all(isinstance(one, dict) for one in node.merged):
                raise self._error(event, "<< must hold a mapping; quote other keys of this name")
        else:
            node.value[node.key] = value
            node.key = None

    def _error(self, event: Any, text: str) -> ValueError:
        return ValueError(f"{_place(self.what, event.start_mark)}: {text}")


def _unread(error: yaml.YAMLError, what: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        where, reason = what, str(error).splitlines()[0]
    else:
        where = _place(what, error.problem_mark or error.context_mark)
        reason = ", ".join(filter(None, (error.context, error.problem)))
    return f"{where}: this is no YAML: {shown(reason, 200, quotes=False)}"


def _place(what: str, mark: Any) -> str:
    return f"{what}, line {mark.line + 1}, column {mark.column + 1}" if mark else what


def _tagged(tag: str) -> str:
    return f"the tag {shown(tag)} is not read; write the plain value"


def _check_size(text: str, what: str, most: int) -> None:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise ValueError(f"{what}, line {line}: half a character; save it as UTF-8") from None
    if size > most:
        raise ValueError(f"{what} has {size} bytes, and the limit is {most}")


def _too_deep(what: str) -> str:
    return f"{what}: more than {DEPTH} mappings and lists inside one another"


def _json(text: str, what: str) -> Any:
    try:
        tree = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(_too_deep(what)) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ValueError(f"{what}: {shown(str(error), 300, quotes=False)}") from None
    level: list[Any] = [[tree]]
    depth = -1
    halves = "\\ud" in text.lower()
    while level := [v for node in level for v in _children(node, what, halves)]:
        depth += 1
        if depth > DEPTH:
            raise ValueError(_too_deep(what))
    return tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands there twice; keep one")
    return tree


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _children(node: Any, what: str, halves: bool) -> Iterator[Any]:
    """The containers inside a value; refuses texts with half a character."""
    inside = node.values() if isinstance(node, dict) else node
    if halves:
        for text in (*node, *inside):
            if isinstance(text, str) and not whole(text):
                raise ValueError(f"{what}: the text {shown(text)} holds half a character")
    yield from (v for v in inside if isinstance(v, dict | list))


def whole(text: str) -> bool:
    """Whether a text has no half characters, so that it can be written to a file."""
    return not any("\ud800" <= c <= "\udfff" for c in text)

"""Reads text files of rows: JSON lines, a JSON list or CSV. Text stays the text that was written.

The files are read twice, a row at a time: once to learn the columns and their types, once to
convert the rows. In JSON, a column of one type keeps it, and a column of mixed types becomes text.
Lists and mappings stay JSON. In CSV every column is text, and an empty cell is missing.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow as pa

from fedvlm.data import cells
from fedvlm.data.labels import float_text
from fedvlm.data.tables import converted
from fedvlm.errors import DataError, brief

logger = logging.getLogger("fedvlm")

Row = tuple[dict[str, Any], int]  # a row, and its length in characters
Check = Callable[[datasets.Features], None]

_BATCH, _CHARS = 1000, 16_000_000  # most rows and characters that are converted at a time
_COLUMNS = 10_000  # most columns of a file
_CHUNK = 1_000_000  # characters that are read at a time
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\n\r]*")
_BIG = object()  # the type of a whole number beyond 64 bits
_NAMES = {str: "text", int: "whole numbers", _BIG: "whole numbers", float: "numbers", bool: "flags"}


def read(
    files: Sequence[Path],
    check: Check,
    names: Sequence[str] = (),
    place: Callable[[dict[str, Any], Path], dict[str, Any]] = lambda row, _: row,
) -> datasets.Dataset:
    """Reads text files of one suffix as one data set.

    Args:
        files: at least one file; all are JSON lines, JSON or CSV.
        check: gets the columns, before any row is converted.
        names: columns that the header of a CSV file is expected to have.
        place: gets each row and its file, and returns the row with paths for all files.

    Raises:
        DataError: a file is not UTF-8, is damaged, or has two columns of one name; the message
            names the file and the line or row.
    """
    types: dict[str, set[Any]] = {}
    counts: list[int] = []
    have: list[set[str]] = []
    places: dict[str, dict[str, Path]] = defaultdict(dict)  # column -> type -> its first file
    for file in files:
        own: dict[str, set[Any]] = defaultdict(set)
        count = 0
        for row, _ in _rows(file, names):
            count += 1
            for name, value in row.items():
                own[name].add(_type(value))
            refuse_many_columns(len(own), file)
        counts.append(count)
        have.append(set(own))
        for name, found in own.items():
            types.setdefault(name, set()).update(found)
            if simple := found & _NAMES.keys():
                held = " and ".join(sorted(_NAMES[kind] for kind in simple))
                places[name].setdefault(held, file)
    if not any(counts):
        raise DataError(f"'{brief(files[0], 200)}' has no rows")
    report_absent(files, counts, have, list(types))
    features = datasets.Features({name: _feature(found) for name, found in types.items()})
    for name, kinds in places.items():
        if getattr(features[name], "dtype", "") == "string" and len(kinds) > 1:
            report_types(name, kinds)
    check(features)
    return converted(files, features, lambda: _tables(files, features, names, place))


def refuse_many_columns(count: int, file: Path) -> None:
    """Refuses a file of more columns than a data set can have in reasonable time."""
    if count > _COLUMNS:
        raise DataError(
            f"'{brief(file, 200)}' has more than {_COLUMNS} columns; rows are objects or lines "
            "with the same columns: put values whose names differ by row into one column"
        )


def report_absent(
    files: Sequence[Path], counts: Sequence[int], have: Sequence[set[str]], names: Sequence[str]
) -> None:
    """Warns of columns that whole files lack. Their values are missing in these rows."""
    for file, count, own in zip(files, counts, have, strict=True):
        absent = [name for name in names if name not in own]
        if count and absent:
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            logger.warning(
                "'%s' has no column %s%s, which other files have: the values of its %d rows are "
                "missing",
                file.name,
                ", ".join(f"'{name:.60}'" for name in absent[:5]),
                more,
                count,
            )


def report_types(name: str, places: Mapping[Any, Path]) -> None:
    """Warns of a column that has several types, each in the file that is named."""
    kinds = [f"{brief(k, 40)} in '{brief(file.name, 80)}'" for k, file in places.items()]
    more = f" and {len(kinds) - 5} more types" if len(kinds) > 5 else ""
    logger.warning(
        "the column '%s' holds %s%s; all of them are read as text",
        brief(name, 80),
        ", ".join(kinds[:5]),
        more,
    )


def _type(value: Any) -> Any:
    if type(value) is int and not -(2**63) <= value < 2**63:
        return _BIG
    return type(value)


def _feature(types: set[Any]) -> Any:
    types = types - {type(None)}
    if types & {list, dict}:
        return datasets.Json()
    simple = {int: "int64", float: "float64", bool: "bool"}
    one = next(iter(types)) if len(types) == 1 else str
    return datasets.Value(simple.get(one, "string"))


def _tables(
    files: Sequence[Path],
    features: datasets.Features,
    names: Sequence[str],
    place: Callable[[dict[str, Any], Path], dict[str, Any]],
) -> Iterator[pa.Table]:
    batch: list[dict[str, Any]] = []
    chars = 0
    for file in files:
        for row, length in _rows(file, names):
            batch.append(place(row, file))
            chars += length
            if len(batch) == _BATCH or chars > _CHARS:
                yield _table(batch, features)
                batch, chars = [], 0
    if batch:
        yield _table(batch, features)


def _table(batch: Sequence[dict[str, Any]], features: datasets.Features) -> pa.Table:
    have: dict[str, list[Any]] = {}  # the columns that the batch has
    for at, row in enumerate(batch):
        for name, value in row.items():
            if name not in have:
                have[name] = [None] * len(batch)
            have[name][at] = value
    schema = features.arrow_schema
    columns = [
        _column(have[field.name], features[field.name], field.type)
        if field.name in have
        else pa.nulls(len(batch), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(values: list[Any], feature: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(feature, datasets.Json):
        texts = [None if value is None else json.dumps(value) for value in values]
        return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))
    if feature.dtype == "string":
        values = [v if v is None or isinstance(v, str) else _plain_text(v) for v in values]
    return pa.array(values, kind)


def _plain_text(value: Any) -> str:
    return float_text(value) if isinstance(value, float) else str(value)


def _rows(file: Path, names: Sequence[str]) -> Iterator[Row]:
    with _text(file) as text:
        if file.suffix.lower() in (".csv", ".tsv"):
            yield from cells.rows(text, file, names)
        else:
            yield from _json_rows(text, file)


@contextmanager
def _text(file: Path) -> Iterator[TextIO]:
    """Opens a text file of UTF-8, with or without byte order mark."""
    with open(file, "rb") as content:
        if b"\0" in content.read(4):
            raise DataError(
                f"'{file}' is not UTF-8 text (it has zero bytes, as UTF-16 has): save it as UTF-8"
            )
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            yield text
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise DataError(
            f"'{file}' is not UTF-8 text (it has the byte 0x{found:02x} where a letter should be): "
            "save it as UTF-8"
        ) from None


# JSON


def _json_rows(text: TextIO, file: Path) -> Iterator[Row]:
    source = _Source(text)
    number = 0
    try:
        lines = file.suffix.lower() in (".jsonl", ".ndjson") and source.next() != "["
        for row, length in source.lines() if lines else source.values():
            if not isinstance(row, dict):
                raise ValueError(f"a row is an object with columns, not {row!r:.60}")
            _check_numbers(row)
            yield row, length
            number += 1
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"cannot read row {number}{source.place} of '{file}': {_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    return f"{error}"[:300]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twin:.60}' occurs twice in one object")
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write null for a missing value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _check_numbers(row: dict[str, Any]) -> None:
    for name, value in row.items():
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"the number in '{name:.60}' is too large")


def _check_surrogates(text: str, value: Any) -> None:
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                "it holds half of a surrogate pair, such as \\ud800 alone, which is no text"
            ) from None


class _Source:
    """Reads JSON values one after another, without the whole file in memory.

    Attributes:
        place: the line of the last value, for a message; empty if values are not in lines.
    """

    def __init__(self, text: TextIO):
        self.text, self.buffer, self.at, self.place = text, "", 0, ""

    def next(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            found = _SPACE.match(self.buffer, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.buffer) or not self._more():
                return self.buffer[self.at : self.at + 1]

    def lines(self) -> Iterator[tuple[Any, int]]:
        """Reads one value a line from the start of the file, with its length."""
        self.text.seek(0)
        for number, line in enumerate(self.text, 1):
            if not line.isspace():
                self.place = f" (line {number})"
                value = _DECODER.decode(line)
                _check_surrogates(line, value)
                yield value, len(line)

    def values(self) -> Iterator[tuple[Any, int]]:
        """Reads the values of a list, or values one after another, with their lengths."""
        listed = self.next() == "["
        self.at += listed
        first = True
        while self.next() not in ("", "]"):
            if listed and not first:
                self._take(",")
                self.next()
            first = False
            yield self._value()
        if listed:
            self._take("]")
        if self.next():
            raise ValueError(f"{self.buffer[self.at : self.at + 20]!r} stands after the end")

    def _take(self, sign: str) -> None:
        if self.next() != sign:
            found = self.buffer[self.at : self.at + 20]
            raise ValueError(f"expected '{sign}', got {found!r}" if found else "the file is cut")
        self.at += 1

    def _value(self) -> tuple[Any, int]:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
                break
            except json.JSONDecodeError as error:  # perhaps cut at the end of the buffer
                if not self._more():
                    raise ValueError(error.msg) from None
        _check_surrogates(self.buffer[self.at : end], value)
        length, self.at = end - self.at, end
        return value, length

    def _more(self) -> bool:
        """Reads as much again, so that a long value is decoded few times."""
        self.buffer, self.at = self.buffer[self.at :], 0
        more = self.text.read(_CHUNK + len(self.buffer))
        self.buffer += more
        return bool(more)

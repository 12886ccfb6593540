"""CSV files: every cell is text, and an empty cell is missing."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from fedvlm.errors import DataError

logger = logging.getLogger("fedvlm")

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_SEPARATOR = re.compile(r"\"?sep=([^\"\s\w]|\t)\"?", re.IGNORECASE)
_END = "\x1a"  # Ctrl-Z, the end of a text in old programs


def rows(text: TextIO, file: Path, names: Sequence[str]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields the rows of a CSV file, with their lengths in characters.

    The header decides which of comma, semicolon and tab separates the cells, unless a first line
    such as ``sep=;`` does, which spreadsheet programs write. Empty lines are no rows.

    Args:
        text: the file.
        file: its path, for messages.
        names: columns that the header is expected to have.

    Raises:
        DataError: a line has more or fewer cells than the header, the quotes are wrong, or two
            columns have one name.
    """
    csv.field_size_limit(2**31 - 1)  # the limit of all readers; a cell may hold a picture
    first = next((line for line in text if line.strip()), "")
    mark = _SEPARATOR.fullmatch(first.strip("\r\n"))
    delimiter = mark[1] if mark else _delimiter(first, names)
    if delimiter != ",":
        named = _DELIMITERS.get(delimiter, repr(delimiter))
        logger.info("'%s': the columns are separated by %s", file.name, named)
    text.seek(0)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if mark and cells:  # the line of the mark itself
                mark = None
            elif cells == [_END] or (not header and not any(cell.strip() for cell in cells)):
                continue
            elif not header:
                header = _header(cells, file)
            elif len(cells) == len(header):
                filled = [cell or None for cell in cells]
                yield dict(zip(header, filled, strict=True)), sum(map(len, cells))
            elif cells:  # an empty line is no row
                raise DataError(
                    f"line {reader.line_num} of '{file}' has {len(cells)} cells, but the header "
                    f"has {len(header)}: quote cells that hold a separator or a line break"
                )
    except csv.Error as error:
        raise DataError(
            f"line {reader.line_num} of '{file}' is not valid CSV ({error}): quote cells that hold "
            "quotes, separators or line breaks, and double quotes inside them"
        ) from None


def _delimiter(header: str, names: Sequence[str]) -> str:
    """The separator that splits the header into the most expected names, then into most names."""

    def quality(delimiter: str) -> tuple[int, int]:
        cells = next(csv.reader([header.strip("\r\n")], delimiter=delimiter), [])
        return len(set(cells) & set(names)), len(cells)

    return max(_DELIMITERS, key=quality)


def _header(cells: list[str], file: Path) -> list[str]:
    named = [cell or f"Unnamed: {number}" for number, cell in enumerate(cells)]
    _refuse_twins(named, f"the header of '{file}'")
    return named


def _refuse_twins(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        twin = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where} has two columns '{twin:.60}': name them differently")

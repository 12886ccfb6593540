"""Turns the values of a column into numbered labels.

The values of any column are text: ``007`` and ``07`` are two labels. Where all texts of a column
are numbers in their usual form, the labels have the order of the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

BINS = 10  # bins for numbers, if there are more than twice as many values

_WHOLE = re.compile(r"-?[1-9][0-9]{0,4000}|0")
_BROKEN = re.compile(r"-?[0-9]+\.[0-9]+|-?[0-9](\.[0-9]+)?e[+-][0-9]+|-?inf")


def values_of(rows: datasets.Dataset, column: str) -> np.ndarray:
    """Reads a column as text. A missing value, and NaN, is the empty text.

    Whole floats have no point: 1.0 is ``1``.
    """
    return np.array(texts(rows.with_format("arrow")[column][:], missing=""), dtype=object)


def texts(column: pa.ChunkedArray | pa.Array, missing: Any) -> list[Any]:
    """The exact text of every scalar, and ``missing`` for what is missing."""
    kind = column.type
    if pa.types.is_floating(kind):
        return [_float_text(value, missing) for value in column.to_pylist()]
    return [missing if value is None else str(value) for value in column.to_pylist()]


def _float_text(value: float | None, missing: Any) -> Any:
    if value is None or value != value:
        return missing
    return str(int(value)) if float(value).is_integer() else str(float(value))


def codes_of(values: np.ndarray, *, as_text: bool = False) -> tuple[np.ndarray, list[str]]:
    """Numbers the labels in sorted order. Missing values are one more label.

    Args:
        values: texts.
        as_text: the order is that of the texts, even if all of them are numbers.

    Returns:
        The number of each value's label, and the names of the labels.
    """
    codes, distinct, _ = _coded(values, as_text)
    return codes, [value or "(missing)" for value in distinct]


def binned_codes(values: np.ndarray, *, as_text: bool = False) -> tuple[np.ndarray, list[str]]:
    """As :func:`codes_of`, but many different numbers become bins of about equal counts."""
    codes, distinct, found = _coded(values, as_text)
    if found is None or len(distinct) <= 2 * BINS:
        return codes, [value or "(missing)" for value in distinct]
    numbers = np.array(found, dtype=np.float64)[codes]
    edges = np.unique(np.nanquantile(numbers, np.linspace(0, 1, BINS + 1)[1:-1]))
    bins = np.searchsorted(edges, numbers, side="right")
    bins = np.where(np.isnan(numbers), len(edges) + 1, bins)
    marks = ["", *(f"{edge:.6g}" for edge in edges), ""]
    bounds = [f"{low}..{high}" for low, high in pairwise(marks)]
    return bins, [*bounds, "(missing)"]


def _coded(
    values: np.ndarray, as_text: bool
) -> tuple[np.ndarray, list[str], list[int | float] | None]:
    """The code of each value, the distinct values in order, and their numbers if all have one."""
    distinct = sorted(set(values.tolist()))
    numbers = None if as_text else _numbers(distinct)
    if numbers is not None:
        pairs = sorted(zip(distinct, numbers, strict=True), key=lambda pair: (not pair[0], pair[1]))
        distinct, numbers = [text for text, _ in pairs], [number for _, number in pairs]
    place = {value: code for code, value in enumerate(distinct)}
    return np.array([place[value] for value in values], dtype=np.int64), distinct, numbers


def _numbers(distinct: Sequence[str]) -> list[int | float] | None:
    """The numbers that texts are, or None if a text is no number in its usual form.

    The usual form is the one that Python writes, so that no two texts are the same number: not
    ``007`` or ``1E2``. A missing value is NaN.
    """
    numbers: list[int | float] = []
    for text in distinct:
        if text == "":
            numbers.append(np.nan)
        elif _WHOLE.fullmatch(text):
            numbers.append(int(text))
        elif _BROKEN.fullmatch(text) and str(float(text)) == text:
            numbers.append(float(text))
        else:
            return None
    return numbers if any(distinct) else None

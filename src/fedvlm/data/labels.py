"""Turns the values of a column into numbered labels.

The values of any column are text: ``007`` and ``07`` are two labels. Where all texts of a column
are numbers in their usual form, the labels have the order of the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from decimal import Decimal
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedvlm.errors import DataError, brief

if TYPE_CHECKING:
    import datasets

BINS = 10  # bins for numbers, if there are more than twice as many values

_MOST = 10**300
_WHOLE = re.compile(r"-?[1-9][0-9]{0,4000}|0")
_BROKEN = re.compile(r"-?[0-9]+\.[0-9]+|-?[0-9](\.[0-9]+)?e[+-][0-9]+|-?inf")


def values_of(rows: datasets.Dataset, column: str) -> np.ndarray:
    """Reads a column as text. A missing value, and NaN, is the empty text.

    See :func:`texts`.
    """
    return np.array(texts(rows.with_format("arrow")[column][:], missing=""), dtype=object)


def texts(column: pa.ChunkedArray | pa.Array, missing: Any, *, days: bool = False) -> list[Any]:
    """The text of every scalar. Equal values have the same text, whatever their type.

    Whole floats and decimals have no point, and decimals no zeros at the end. ``float32`` has its
    own shortest text. A time with a zone is that of UTC. A time that no calendar holds is a number.

    Args:
        column: scalars.
        missing: stands for a missing value, and for NaN.
        days: a time at midnight has the text of its date.
    """
    kind, types = column.type, pa.types
    if types.is_floating(kind):
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        arrays = (chunk.to_numpy(zero_copy_only=False) for chunk in chunks)
        return [float_text(value, missing) for values in arrays for value in values]
    text: Callable[[Any], str] = str
    if types.is_decimal(kind):
        text = _decimal_text
    elif types.is_duration(kind):
        text, column = partial(_duration_text, kind.unit), column.cast(pa.int64())
    elif types.is_timestamp(kind) or types.is_time(kind) or types.is_date(kind):
        zone = getattr(kind, "tz", None)
        text = partial(_time_text, "+00:00" if zone else "", days)
        if zone:  # the stored number is that of UTC, so no zone needs to be known
            column = column.cast(pa.int64()).cast(pa.timestamp(kind.unit))
        column = column.cast(pa.string())
    return [missing if value is None else text(value) for value in column.to_pylist()]


def float_text(value: float | np.floating, missing: Any = None) -> Any:
    """The shortest text that is this number; whole numbers have no point."""
    if value != value:
        return missing
    if value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, np.float32 | np.float16) else str(float(value))


def _decimal_text(value: Decimal) -> str:
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _time_text(zone: str, days: bool, text: str) -> str:
    """The text of a time or a date, which is the same for all units of the time."""
    if text.startswith("<"):  # a number that is out of range
        return text
    head, _, fraction = text.partition(".")
    fraction = fraction.rstrip("0")
    if fraction:
        head += "." + fraction.ljust(6 if len(fraction) <= 6 else 9, "0")
    return head.removesuffix(" 00:00:00") if days and not zone else head + zone


def _duration_text(unit: str, value: int) -> str:
    nanoseconds = value * {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}[unit]
    try:
        text = str(timedelta(microseconds=nanoseconds // 1000))
    except OverflowError:
        return f"{nanoseconds} ns"
    rest = nanoseconds % 1000
    return f"{text} {rest} ns" if rest else text


def names_of(names: Sequence[str], column: pa.ChunkedArray, name: str) -> pa.Array:
    """The names of the classes in a column of class labels; a negative number is missing.

    Raises:
        DataError: there is no class of a number.
    """
    codes = column.cast(pa.int64()).combine_chunks()
    codes = codes if isinstance(codes, pa.Array) else pa.concat_arrays(codes.chunks)
    most = pc.max(codes).as_py()
    if most is not None and most >= len(names):
        raise DataError(
            f"the column '{brief(name, 80)}' holds class number {most}, but it names "
            f"{len(names)} classes, from number 0: repair the numbers or the names"
        )
    known = pc.greater_equal(codes, 0)
    return pa.array(names, pa.string()).take(pc.if_else(known, codes, None))


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
    numbers = np.array([_bounded(number) for number in found])[codes]
    edges = np.unique(np.nanquantile(numbers, np.linspace(0, 1, BINS + 1)[1:-1]))
    bins = np.searchsorted(edges, numbers, side="right")
    bins = np.where(np.isnan(numbers), len(edges) + 1, bins)
    marks = ["", *(f"{edge:.6g}" for edge in edges), ""]
    bounds = [f"{low}..{high}" for low, high in pairwise(marks)]
    return bins, [*bounds, "(missing)"]


def _bounded(number: int | float) -> float:
    """A number within the limits in which means of two numbers are finite."""
    return number if number != number else float(max(-_MOST, min(number, _MOST)))


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

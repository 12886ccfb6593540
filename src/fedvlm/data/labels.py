"""Turns the values of a column into numbered labels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import pandas as pd

BINS = 10  # bins for numbers, if there are more than twice as many values


def values_of(rows: datasets.Dataset, column: str) -> np.ndarray:
    """Reads a column: numbers as numbers (missing: NaN), all else as text (missing: empty)."""
    values = pd.Series(rows.with_format(None)[column][:])
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return values.to_numpy()
    return np.array(["" if pd.isna(v) else str(v) for v in values], dtype=object)


def codes_of(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Numbers the labels in sorted order. Missing values are one more label.

    Returns:
        The number of each value's label, and the names of the labels.
    """
    codes, distinct = pd.factorize(values, sort=True, use_na_sentinel=False)
    return codes, [_text(value) for value in distinct]


def binned_codes(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """As :func:`codes_of`, but many different numbers become bins of about equal counts."""
    codes, names = codes_of(values)
    if values.dtype == object or len(names) <= 2 * BINS:
        return codes, names
    edges = np.unique(np.nanquantile(values, np.linspace(0, 1, BINS + 1)[1:-1]))
    bins = np.where(pd.isna(values), len(edges) + 1, np.searchsorted(edges, values, side="right"))
    marks = ["", *(f"{edge:.6g}" for edge in edges), ""]
    bounds = [f"{low}..{high}" for low, high in pairwise(marks)]
    return bins, [*bounds, "(missing)"]


def _text(value: Any) -> str:
    if pd.isna(value) or value == "":
        return "(missing)"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

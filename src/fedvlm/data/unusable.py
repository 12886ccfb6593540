"""Rows that cannot be used: named, and then refused or left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import islice
from typing import Literal

import datasets
import numpy as np

from fedvlm.errors import DataError, brief

logger = logging.getLogger("fedvlm")

_REASONS = 5  # rows whose reasons are named
_NUMBERS = 20  # rows whose numbers are named


def without(
    rows: datasets.Dataset, bad: Mapping[int, str], name: str, on_error: Literal["fail", "skip"]
) -> datasets.Dataset:
    """Refuses rows that cannot be used, or leaves them out with a warning.

    Args:
        rows: all rows, with ``row`` or ``name``.
        bad: position in ``rows`` -> reason.
        name: the name of the data, for messages.
        on_error: ``fail`` refuses, ``skip`` leaves out.

    Raises:
        DataError: a row cannot be used, or no row can be used. The message names the first rows.
    """
    if not bad:
        return rows
    key = "row" if "row" in rows.column_names else "name"  # the file of a single picture
    where, name, count = sorted(bad), brief(name), len(rows)
    numbers = rows.select_columns([key]).with_format("arrow")[key][:].to_numpy()
    listed = "; ".join(f"{key} {numbers[at]}: {brief(bad[at])}" for at in where[:_REASONS])
    listed += f"; and {len(bad) - _REASONS} more" if len(bad) > _REASONS else ""
    if on_error == "fail":
        raise DataError(
            f"{name} has {len(bad)} of {count} rows that cannot be used: {listed}. "
            "Repair them, or leave them out with data.on_error=skip"
        )
    if len(bad) == count:
        raise DataError(f"{name} has no usable row: {listed}")
    if len(bad) > _REASONS:
        left = dict.fromkeys(numbers[where].tolist())  # rows of a conversation share a number
        listed += ". Their numbers: " + ", ".join(map(str, islice(left, _NUMBERS)))
        listed += f" and {len(left) - _NUMBERS} more" if len(left) > _NUMBERS else ""
    logger.warning("left out %d of %d rows of %s: %s", len(bad), count, name, listed)
    return rows.select(np.setdiff1d(np.arange(count), where))

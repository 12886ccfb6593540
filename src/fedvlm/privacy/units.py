"""The protected units of a client: its training rows, or groups of rows with one value."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedvlm.data.labels import values_of


def units_of(rows: Any, chosen: np.ndarray, column: str | None) -> list[np.ndarray]:
    """The units among some rows; each unit is an array of positions.

    Args:
        rows: from :func:`fedvlm.data.sources.load_rows`.
        chosen: positions of a client's training rows.
        column: rows with equal values in this column are one unit; None: every row is one.
            A row without a value is a unit of its own.
    """
    if column is None:
        return [np.array([row]) for row in chosen]
    known: dict[tuple[str, Any], list[int]] = {}
    for at, value in zip(chosen, values_of(rows, column)[chosen], strict=True):
        known.setdefault(("value", value) if value else ("row", at), []).append(int(at))
    return [np.array(unit) for unit in known.values()]

"""Makes clients from lists of row numbers, in the configuration or in a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedvlm import documents
from fedvlm.data.assign import by_owner
from fedvlm.errors import DataError, counted
from fedvlm.settings.sections import checked

logger = logging.getLogger("fedvlm")

MOST = 2**28  # bytes of the largest file of lists


def read(path: str | Path) -> dict[str, list[int]]:
    """Reads the lists of a JSON or YAML file.

    Raises:
        DataError: the file cannot be read, or does not hold such lists.
    """
    what = f"partition.lists '{path}'"
    try:
        text = documents.read_text(Path(os.path.expanduser(path)), MOST)
        reads_json = Path(path).suffix.lower() == ".json"
        read_one = documents.read_json if reads_json else documents.read_yaml
        return checked(read_one(text, what, MOST))
    except (OSError, ValueError) as error:
        raise DataError(f"{what} cannot be used: {error}") from None


def by_lists(
    numbers: np.ndarray, lists: Mapping[str, Sequence[int]], some_left_out: bool
) -> dict[str, np.ndarray]:
    """Finds the positions of each client's rows in ``numbers``.

    Args:
        numbers: number of each row; the rows of one conversation share a number.
        lists: client -> row numbers, each of them once; see :func:`checked`.
        some_left_out: the lists may name rows that were left out, by ``data.max_rows`` or
            ``data.on_error=skip``.

    Raises:
        DataError: a row is in no list, or a listed row does not exist.
    """
    listed = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in lists.values()])
    absent = listed[~np.isin(listed, numbers)]
    if len(absent) and not some_left_out:
        raise DataError(
            f"partition.lists names {counted(len(absent), 'missing row')}, the first is row "
            f"{absent[0]}: the rows of the data are {numbers.min()} to {numbers.max()}"
        )
    missing = np.unique(numbers[~np.isin(numbers, listed)])
    if len(missing):
        raise DataError(
            f"partition.lists leaves out {len(missing)} of {len(np.unique(numbers))} rows, the "
            f"first is row {missing[0]}: list every row once"
        )
    if len(absent):
        logger.warning("partition.lists: %d listed rows were left out of the data", len(absent))
    sizes = [len(rows) for rows in lists.values()]
    order = np.argsort(listed)
    owners = np.repeat(np.arange(len(sizes)), sizes)[order]
    found = owners[np.searchsorted(listed[order], numbers)]
    return dict(zip(lists, by_owner(found, len(sizes)), strict=True))

"""Clients from lists of row numbers, inline in the configuration or in a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from fedvlm.data.assign import by_owner
from fedvlm.errors import DataError
from fedvlm.settings.sections import checked

logger = logging.getLogger("fedvlm")


def read(path: str | Path) -> dict[str, list[int]]:
    """The lists in a JSON or YAML file.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        return checked(yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise DataError(f"partition.lists '{path}' cannot be used: {error}") from None


def by_lists(
    numbers: np.ndarray, lists: Mapping[str, Sequence[int]], some_left_out: bool
) -> dict[str, np.ndarray]:
    """Each client's positions in ``numbers``.

    Args:
        numbers: the rows' numbers; those of one conversation share theirs.
        lists: client -> row numbers, each once; see :func:`checked`.
        some_left_out: the lists may name rows that were left out (``data.max_rows``, or corrupt
            ones with ``data.on_error=skip``).

    Raises:
        DataError: for rows in no list, and for listed rows that are not there.
    """
    listed = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in lists.values()])
    absent = listed[~np.isin(listed, numbers)]
    if len(absent) and not some_left_out:
        raise DataError(
            f"partition.lists names {len(absent)} rows that the data do not have, row {absent[0]} "
            f"first: the data's rows are {numbers.min()} to {numbers.max()}"
        )
    missing = np.unique(numbers[~np.isin(numbers, listed)])
    if len(missing):
        raise DataError(
            f"partition.lists leaves out {len(missing)} of {len(np.unique(numbers))} rows, row "
            f"{missing[0]} first: give every row its client"
        )
    if len(absent):
        logger.warning("partition.lists: %d listed rows were left out of the data", len(absent))
    sizes = [len(rows) for rows in lists.values()]
    order = np.argsort(listed)
    owners = np.repeat(np.arange(len(sizes)), sizes)[order]
    found = owners[np.searchsorted(listed[order], numbers)]
    return dict(zip(lists, by_owner(found, len(sizes)), strict=True))

"""Makes clients from lists of row numbers, in the configuration or in a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedvlm.data.assign import by_owner
from fedvlm.errors import DataError
from fedvlm.settings.sections import checked

logger = logging.getLogger("fedvlm")


def read(path: str | Path) -> dict[str, list[int]]:
    """Reads the lists of a JSON or YAML file.

    Raises:
        DataError: the file cannot be read, or does not hold such lists.
    """
    try:
        file = Path(path).expanduser()
        text = file.read_text(encoding="utf-8-sig")
        is_json = file.suffix.lower() in (".json", ".jsonl")
        return checked(json.loads(text) if is_json else yaml.load(text, _TextKeys))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"partition.lists '{path}' cannot be used: {str(error)[:500]}") from None


class _TextKeys(yaml.SafeLoader):
    """Reads YAML whose keys stay the text that was written: ``no`` is a name, not False."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        made = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else self.construct_object(key)
            if name in made:
                raise ValueError(f"the client {name!r:.60} is listed twice")
            made[name] = self.construct_object(value, deep=True)
        return made


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
            f"partition.lists names {len(absent)} rows that do not exist, the first is row "
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

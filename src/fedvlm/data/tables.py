"""Writes tables once into the data-set cache, from where they are read memory-mapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.builder import Key

from fedvlm.errors import DataError


@dataclass
class _Sources(datasets.BuilderConfig):
    features: datasets.Features | None = None
    stamps: tuple[tuple[str, int, int], ...] = ()  # path, time and size of each file


class _Tables(datasets.ArrowBasedBuilder):
    VERSION = datasets.Version("2.0.0")  # of what the rows become; the cache of another is not read
    BUILDER_CONFIG_CLASS = _Sources

    def __init__(self, tables: Callable[[], Iterator[pa.Table]], **options: Any):
        self.tables = tables
        super().__init__(**options)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.features)

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={})]

    def _generate_tables(self) -> Iterator[tuple[Key, pa.Table]]:
        for number, table in enumerate(self.tables()):
            yield Key(0, number), table


def converted(
    files: Sequence[Path],
    features: datasets.Features,
    tables: Callable[[], Iterator[pa.Table]],
) -> datasets.Dataset:
    """Converts files to a memory-mapped data set, or finds it in the cache.

    A file that changed is converted again. An error leaves nothing in the cache.

    Args:
        files: the sources of the rows.
        features: the columns and their types.
        tables: gives the rows as tables of these types.

    Raises:
        DataError: as ``tables`` raises it.
    """
    stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    builder = _Tables(tables, features=features, stamps=stamps)
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise
    return builder.as_dataset("train")

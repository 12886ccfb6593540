"""Converts parquet files of any size to memory-mapped data sets, a few rows at a time.

``datasets`` reads a whole row group into memory, and some writers make a single row group of a file
of a gigabyte. This module holds one page in memory. A page is about 1 MB in files of Hugging Face's
writer, and 1024 rows in files of pandas or pyarrow.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.packaged_modules.parquet.parquet import Parquet

_BATCH = 64  # rows that are converted at a time


def load_dataset(split: str, name: str, **options: Any) -> datasets.Dataset:
    """As ``datasets.load_dataset``, but never holds a whole row group of a parquet file in memory.

    Args:
        split: the split to return.
        name: a builder (``parquet``, ``json``) or a data set on the hub.
        **options: options of ``datasets.load_dataset_builder``.
    """
    builder = datasets.load_dataset_builder(name, **options)
    if isinstance(builder, Parquet):
        builder._generate_tables = partial(_tables, builder)
    builder.download_and_prepare()
    return builder.as_dataset(split)


def _tables(
    builder: Parquet, files: list[str], row_groups_list: object
) -> Iterator[tuple[Key, pa.Table]]:
    """Replaces ``Parquet._generate_tables``."""
    with _returning_memory():
        for number, file in enumerate(files):
            with open(file, "rb") as handle:
                pages = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            source = pq.ParquetFile(pa.BufferReader(pa.py_buffer(pages)), pre_buffer=False)
            for at, batch in enumerate(source.iter_batches(_BATCH)):
                yield Key(number, at), builder._cast_table(pa.Table.from_batches([batch]))
                pages.madvise(mmap.MADV_DONTNEED)  # frees the pages that were read


@contextmanager
def _returning_memory() -> Iterator[None]:
    """Uses an allocator that returns freed memory to the system; Arrow's default one keeps it."""
    before = pa.default_memory_pool()
    jemalloc = "jemalloc" in pa.supported_memory_backends()
    pa.set_memory_pool(pa.jemalloc_memory_pool() if jemalloc else pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)

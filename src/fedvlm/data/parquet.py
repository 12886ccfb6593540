"""Converts parquet files of any size to memory-mapped data sets, a few rows at a time.

``datasets`` reads a whole row group into memory, and some writers make a single row group of a file
of a gigabyte. This module holds one page in memory. A page is about 1 MB in files of Hugging Face's
writer, and 1024 rows in files of pandas or pyarrow.

Files may differ in their columns and types: a column that a file lacks is missing there, and a
column of several scalar types becomes text. The decoded rows have a limit, because a file of 1 kB
can hold gigabytes.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.packaged_modules.parquet.parquet import Parquet

from fedvlm import hub
from fedvlm.data.columns import listed
from fedvlm.data.labels import names_of, texts
from fedvlm.data.records import Check, refuse_many_columns, report_absent, report_types
from fedvlm.data.tables import converted
from fedvlm.errors import DataError, brief

logger = logging.getLogger("fedvlm")

_BATCH = 64  # rows that are converted at a time
_VALUE = 10  # bytes that a number of a list takes at most while it is decoded
_LISTED = 64 * 2**20  # approximate limit on these bytes of the rows that are converted at a time
_FREE = 256 * 2**20  # bytes that any files may decode to


def read(files: Sequence[Path], check: Check, expansion: int) -> datasets.Dataset:
    """Reads parquet files as one data set.

    Args:
        files: at least one file.
        check: gets the columns, before any row is converted.
        expansion: ``data.max_expansion``.

    Raises:
        DataError: files disagree about a column that is no scalar, a file has two columns of one
            name, or the rows are larger than 256 MiB + ``expansion`` x the files.
    """
    limit = _FREE + expansion * sum(file.stat().st_size for file in files)
    opened = [_open(file)[0] for file in files]
    for source, file in zip(opened, files, strict=True):
        refuse_many_columns(source.metadata.num_columns, file)
    found = [source.schema_arrow for source in opened]
    plain = [_plain_schema(schema, file) for schema, file in zip(found, files, strict=True)]
    counts = [source.metadata.num_rows for source in opened]
    schema = _united(plain, files)
    have = [set(own.names) for own in plain]
    report_absent(files, counts, have, schema.names)
    features = datasets.Features.from_arrow_schema(schema)
    check(features)
    if not sum(counts):
        raise DataError(f"'{brief(files[0], 200)}' has no rows")
    _refuse_if_larger(sum(map(_least_bytes, opened)), limit, files)
    cast = partial(_as, features.arrow_schema, _columns_with_days(found))
    return converted(files, features, lambda: _tables(files, limit, cast))


def load_hub(split: str, name: str, expansion: int) -> datasets.Dataset:
    """As ``datasets.load_dataset``, but never holds a whole row group of a parquet file in memory.

    Args:
        split: the split to return.
        name: a data set on the hub.
        expansion: ``data.max_expansion``.
    """
    repo, revision = hub.split(name)
    # Without a connection, datasets takes the newest rows of its cache, whatever their revision.
    cache = datasets.config.HF_DATASETS_CACHE
    own = os.path.join(cache, "revisions", quote(revision, safe="")) if revision else None
    builder = datasets.load_dataset_builder(repo, revision=revision, cache_dir=own)
    if isinstance(builder, Parquet):
        builder._generate_tables = partial(_hub_tables, builder, expansion)
    builder.download_and_prepare()
    return builder.as_dataset(split)


def _hub_tables(
    builder: Parquet, expansion: int, files: list[str], row_groups_list: object
) -> Iterator[tuple[Key, pa.Table]]:
    """Replaces ``Parquet._generate_tables``."""
    paths = [Path(file) for file in files]
    limit = _FREE + expansion * sum(path.stat().st_size for path in paths)
    for at, table in enumerate(_tables(paths, limit, builder._cast_table)):
        yield Key(0, at), table


def _as(schema: pa.Schema, with_days: set[str], table: pa.Table) -> pa.Table:
    """Casts a table of one file to the columns of all files."""
    have, classes = set(table.column_names), _classes(table.schema)
    columns = []
    for field in schema:
        if field.name not in have:
            columns.append(pa.nulls(len(table), field.type))
            continue
        column = table[field.name]
        if field.name in classes:
            column = pa.chunked_array([names_of(classes[field.name], column, field.name)])
        columns.append(_cast(column, field.type, field.name in with_days))
    return pa.Table.from_arrays(columns, schema=schema)


def _classes(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of the classes of each column of class labels of one file."""
    notes = schema.metadata or {}
    if b"ClassLabel" not in notes.get(b"huggingface", b""):
        return {}
    whole = [field for field in schema if pa.types.is_integer(field.type)]
    features = datasets.Features.from_arrow_schema(pa.schema(whole, metadata=notes))
    kind = datasets.ClassLabel
    return {name: found.names for name, found in features.items() if isinstance(found, kind)}


def _columns_with_days(schemas: Sequence[pa.Schema]) -> set[str]:
    """The columns that hold dates in one file and times in another."""
    fields = [field for schema in schemas for field in schema]
    days = {field.name for field in fields if pa.types.is_date(field.type)}
    return days & {field.name for field in fields if pa.types.is_timestamp(field.type)}


def _tables(
    files: Sequence[Path], limit: int, cast: Callable[[pa.Table], pa.Table]
) -> Iterator[pa.Table]:
    """Yields the rows in tables of at most 64 rows."""
    size = 0
    with _returning_memory():
        for file in files:
            source, pages = _open(file)
            for batch in source.iter_batches(_rows_at_a_time(source, limit)):
                table = cast(pa.Table.from_batches([batch]))
                size += table.nbytes
                _refuse_if_larger(size, limit, files)
                yield table
                pages.madvise(mmap.MADV_DONTNEED)  # frees the pages that were read


def _open(file: Path) -> tuple[pq.ParquetFile, mmap.mmap]:
    with open(file, "rb") as handle:
        pages = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        source = pa.BufferReader(pa.py_buffer(pages))
        return pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True), pages
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read '{file}' as parquet: {brief(error, 300)}") from None


# Limits


def _least_bytes(source: pq.ParquetFile) -> int:
    """A lower bound of the size of the decoded rows, from the footer of the file."""
    widths = sum(_width(field.type) for field in source.schema_arrow)
    return max(source.metadata.num_rows * widths, max(_chunks(source), default=0))


def _width(kind: pa.DataType) -> int:
    try:
        return kind.bit_width // 8
    except ValueError:  # no fixed width
        return 4


def _chunks(source: pq.ParquetFile) -> Iterator[int]:
    """Yields the size of every column in every row group, before it is decompressed to values."""
    groups = map(source.metadata.row_group, range(source.metadata.num_row_groups))
    for group in groups:
        yield from (group.column(k).total_uncompressed_size for k in range(group.num_columns))


def _rows_at_a_time(source: pq.ParquetFile, limit: int) -> int:
    """Rows of a batch. A value is at most as large as its chunk, and any row may repeat it."""
    largest = 2 * limit // max(1, *_chunks(source), 1)
    listed = _LISTED // (_VALUE * max(1, _most_values(source)))
    return int(np.clip(min(largest, listed), 1, _BATCH))


def _most_values(source: pq.ParquetFile) -> int:
    """The largest mean number of values that the lists of one column have in a row."""
    groups = map(source.metadata.row_group, range(source.metadata.num_row_groups))
    return max(
        (
            group.column(k).num_values // max(1, group.num_rows)
            for group in groups
            for k in range(group.num_columns)
        ),
        default=1,
    )


def _refuse_if_larger(size: int, limit: int, files: Sequence[Path]) -> None:
    if size > limit:
        raise DataError(
            f"the rows of '{files[0].name}'"
            + (f" and {len(files) - 1} more files" if len(files) > 1 else "")
            + f" take more than {limit / 2**20:.0f} MiB when they are decoded, though the files "
            f"have {sum(file.stat().st_size for file in files) / 2**20:.3g} MiB. If the files come "
            "from a source that you trust, raise data.max_expansion"
        )


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


# Types


def _plain_schema(schema: pa.Schema, file: Path) -> pa.Schema:
    """The columns without views, dictionaries and other encodings of a type."""
    twins = [name for name, count in Counter(schema.names).items() if count > 1]
    if twins:
        raise DataError(f"'{file}' has several columns named {listed(twins)}: rename them")
    plain = {field.name: _plain(field.type) for field in schema}
    known = pa.schema([(name, kind) for name, kind in plain.items() if _is_known(kind)])
    features = datasets.Features.from_arrow_schema(known.with_metadata(schema.metadata))
    text = datasets.Value("string")
    return datasets.Features({**features, **dict.fromkeys(_classes(schema), text)}).arrow_schema


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(kind, pa.JsonType):
        if kind == pa.uuid():
            return pa.string()
        known = type(kind).__module__.startswith("datasets")
        return kind if known else _plain(kind.storage_type)
    views = {"string_view": pa.string(), "binary_view": pa.binary()}
    if str(kind) in views:
        return views[str(kind)]
    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _plain(f.type)) for f in kind])
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type), kind.list_size)
    if pa.types.is_list(kind) or "list_view" in str(kind):
        return pa.list_(_plain(kind.value_type))
    return kind


def _is_known(kind: pa.DataType) -> bool:
    """Whether ``datasets`` has this type. The others are no columns of rows: maps and unions."""
    try:
        datasets.Features.from_arrow_schema(pa.schema([("x", kind)]))
    except (ValueError, NotImplementedError):
        return False
    return True


def _united(schemas: Sequence[pa.Schema], files: Sequence[Path]) -> pa.Schema:
    """One schema for all files. Different scalar types of a column become text."""
    first = schemas[0]
    if all(schema.equals(first, check_metadata=True) for schema in schemas):
        return first
    kinds: dict[str, dict[pa.DataType, Path]] = defaultdict(dict)
    for schema, file in zip(schemas, files, strict=True):
        for field in schema:
            kinds[field.name].setdefault(field.type, file)
    notes = {(schema.metadata or {}).get(b"huggingface") for schema in schemas}
    fields = [(name, _one_type(name, places)) for name, places in kinds.items()]
    return pa.schema(fields, metadata=first.metadata if len(notes) == 1 else None)


def _one_type(name: str, places: Mapping[pa.DataType, Path]) -> pa.DataType:
    """The type of a column that has these types in these files."""
    types = pa.types
    kinds = [kind for kind in places if not types.is_null(kind)] or [pa.null()]
    apart = any(types.is_nested(kind) or "binary" in str(kind) for kind in kinds)
    whole = all(map(types.is_integer, kinds))
    if len(kinds) == 1:
        return kinds[0]
    if not whole and not apart:
        report_types(name, {kind: places[kind] for kind in kinds})
        return pa.string()
    try:
        schemas = [pa.schema([(name, kind)]) for kind in kinds]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        one, two = kinds[:2]
        raise DataError(
            f"the column '{brief(name)}' holds {brief(one, 100)} in '{places[one]}', but "
            f"{brief(two, 100)} in '{places[two]}': convert one of the files"
        ) from None


def _cast(column: pa.ChunkedArray, kind: pa.DataType, days: bool = False) -> pa.ChunkedArray:
    """Casts a column to its plain type."""
    if column.type == kind:
        return column
    if isinstance(column.type, pa.DictionaryType):
        return _cast(column.cast(column.type.value_type), kind, days)
    if pa.types.is_string(kind) and "string" not in str(column.type):
        found = texts(column, missing=None, days=days)
        return pa.chunked_array([pa.array(found, pa.string())])
    return pa.chunked_array([_cast_array(chunk, kind) for chunk in column.chunks], kind)


def _cast_array(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type == kind:
        return array
    if isinstance(array, pa.ExtensionArray):
        return _cast_array(array.storage, kind)
    if isinstance(array, pa.DictionaryArray):
        return _cast_array(array.dictionary_decode(), kind)
    try:
        if "list_view" not in str(array.type):  # whose cast by pyarrow is not valid
            return array.cast(kind)
    except pa.ArrowNotImplementedError:  # a type inside a structure, or an encoding
        pass
    return pa.array(array.to_pylist(), kind)

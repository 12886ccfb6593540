"""Reads rows from any source, under canonical names: image, question, answer and other columns.

A source is the bundled scenes, a parquet file, a folder of parquet shards, JSONL, JSON or CSV with
image paths, an image folder with ``metadata.jsonl``, a data set saved by ``save_to_disk``, or a
name on the Hugging Face hub. Its rows have questions and answers, or they hold conversations. The
default column names are those of RLAIF-V.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedvlm import hub
from fedvlm.data import parquet, records
from fedvlm.data.columns import (
    OURS,
    check_columns,
    free_name,
    is_scalar,
    name_of,
    roles_of,
    shown,
)
from fedvlm.data.conversations import flatten, holds_conversations
from fedvlm.data.embedded import is_list, moved, path_of, with_bytes
from fedvlm.data.files import SUFFIXES, files_of_rows, is_saved
from fedvlm.data.images import check_pictures, open_image, with_absolute_paths, with_hashes
from fedvlm.data.labels import names_of
from fedvlm.data.pictures import Pictures
from fedvlm.data.records import Check
from fedvlm.data.unusable import without
from fedvlm.errors import DataError, brief
from fedvlm.settings.sections import DataConfig

__all__ = ["load_rows", "open_image"]

logger = logging.getLogger("fedvlm")

ROLES = ("image", "question", "answer")
_VIEWS = {"string_view": "string", "binary_view": "binary"}
_SEVERAL = "the conversation has several answers, but a rejected answer for one only"
_ORDER = (*ROLES, "rejected").index


def load_rows(
    data: DataConfig,
    seed: int = 0,
    *,
    pairs: bool = False,
    answers: bool = True,
    question: str | None = None,
    by: str | None = None,
) -> datasets.Dataset:
    """Reads the rows of a source and checks every one of them.

    Args:
        data: the ``data`` section of the configuration.
        seed: seed of the bundled scenes, and of the sample of ``data.max_rows`` rows unless
            ``data.split_seed`` is set.
        pairs: every row needs a rejected answer too, for training on preferences (DPO).
        answers: every row needs an answer. If False, answers may be empty or their column missing.
        question: text that replaces the question of every row.
        by: the column of the partition, which is checked with the others.

    Returns:
        A data set, memory-mapped if the source is. Its columns are ``image`` (encoded:
        ``{"bytes", "path"}``, see :func:`open_image`, or a list of these), ``question``,
        ``answer``, ``row`` (the row number in the source), and every other scalar column of the
        source under its own name. With ``pairs`` it has ``rejected`` too. A conversation gives
        one row for every answer, see :mod:`fedvlm.data.conversations`; these rows share its number.
        A source column with a canonical name and another meaning becomes ``source_<name>``, or the
        next free name.

    Raises:
        DataError: the source cannot be read or has no rows; a column is missing or has the wrong
            type; or, unless ``data.on_error`` is ``skip``, a row has a corrupt image or no text.
    """
    needed = {*ROLES[:2], *["answer"] * answers, *["rejected"] * pairs}
    asked = needed - ({"question"} if question is not None else set())
    with quiet():
        rows, root = _read(data, seed, partial(_check_source, data, asked, by))
        if len(rows) == 0:
            raise DataError(f"{name_of(data)} has no rows")
        rows, numbers, problems = flatten(rows, data.columns, root)
        if pairs:
            own, answers_of = np.unique(numbers, return_counts=True)
            problems |= dict.fromkeys(own[answers_of > 1].tolist(), _SEVERAL)
        if question is not None:
            rows = _replace(rows, data.columns.question, [question] * len(rows))
        roles = tuple(
            role
            for role in (*ROLES, "rejected")
            if role in needed or (role == "answer" and data.columns.answer in rows.column_names)
        )
        rows = _canonical(rows, data, root, roles, numbers, by)
        rows = _sample(rows, data.max_rows, seed if data.split_seed is None else data.split_seed)
        return _without_bad_rows(rows, data, needed, problems)


@contextmanager
def quiet() -> Iterator[None]:
    """Turns off progress bars, and the logs of libraries whose errors are raised anyway."""
    bars = datasets.are_progress_bars_disabled()
    hub_bars = huggingface_hub.utils.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [each.level for each in loggers]
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
        if not hub_bars:
            huggingface_hub.utils.enable_progress_bars()


# Reading: each reader returns the rows, and the base folder of relative image paths.


def _read(data: DataConfig, seed: int, check: Check) -> tuple[datasets.Dataset, Path]:
    if data.path is None:
        from fedvlm.data.scenes import scenes

        return scenes(**data.scenes.model_dump(), seed=seed), Path()
    path = Path(os.path.expanduser(data.path)).absolute()  # a link keeps its own name and folder
    try:
        if path.is_dir():
            return _read_folder(path, data, check)
        if path.is_file():
            return _read_files([path], data, check), path.parent
        return _read_hub(data), Path()
    except DataError:
        raise
    except Exception as error:  # datasets wraps the errors of pyarrow and the hub
        cause = error.__cause__ or error
        raise DataError(
            f"cannot read {name_of(data)}: {type(cause).__name__}: {brief(cause, 500)}"
        ) from error


def _check_source(
    data: DataConfig, roles: set[str], by: str | None, features: datasets.Features
) -> None:
    """Checks the columns before any row is converted, unless the rows hold conversations."""
    if not holds_conversations(features, data.columns):
        check_columns(features, roles_of(features, data, sorted(roles, key=_ORDER)), data, by)


def _read_files(files: list[Path], data: DataConfig, check: Check) -> datasets.Dataset:
    suffix = files[0].suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{name_of(data)} ends in '{brief(suffix)}'; a file of rows ends in "
            + ", ".join(SUFFIXES)
        )
    empty = [file for file in files if file.stat().st_size == 0]
    if empty:
        raise DataError(f"'{empty[0]}' is an empty file")
    if suffix == ".parquet":
        return parquet.read(files, check, data.max_expansion)
    names = (*data.columns.model_dump().values(), "file_name")
    if len({file.parent for file in files}) == 1:
        return records.read(files, check, names)
    return records.read(files, check, names, partial(moved, image=data.columns.image))


def _read_folder(folder: Path, data: DataConfig, check: Check) -> tuple[datasets.Dataset, Path]:
    if is_saved(folder):
        return _read_saved(folder, data), folder
    files = files_of_rows(folder, data.split)
    root = folder if files[0].suffix.lower() == ".parquet" else files[0].parent
    return _read_files(files, data, check), root


def _read_saved(folder: Path, data: DataConfig) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            f"the saved data set '{brief(folder, 200)}' is empty or damaged "
            f"({type(error).__name__}: {brief(error, 200)}): save it again with save_to_disk"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if data.split not in saved:
            raise DataError(
                f"data.split '{data.split}' is not in '{data.path}'; it has {', '.join(saved)}"
            )
        saved = saved[data.split]
    for name, feature in saved.features.items():
        plain = _VIEWS.get(getattr(feature, "dtype", ""))
        saved = saved.cast_column(name, datasets.Value(plain)) if plain else saved
    return saved


def _read_hub(data: DataConfig) -> datasets.Dataset:
    name = data.path or ""
    if not hub.is_name(name):
        raise DataError(
            f"data.path '{name}' does not exist (looked in {Path.cwd()}), and is not a name on "
            f"the Hugging Face hub either ({hub.NAMES})"
        )
    logger.info("reading '%s' from the Hugging Face hub", name)
    with hub.asked(name, "data set") as refusal:
        try:
            return parquet.load_hub(data.split, name, data.max_expansion)
        except DataError:
            raise
        except Exception as error:
            why = hub.why_not(error, name, "data set", refusal) or brief(error, 500)
            raise DataError(hub.undelivered("data.path", name, why)) from error


# Columns: the source's names and types become the canonical ones.


def _canonical(
    rows: datasets.Dataset,
    data: DataConfig,
    root: Path,
    roles: tuple[str, ...],
    numbers: np.ndarray,
    by: str | None,
) -> datasets.Dataset:
    have = rows.column_names
    names, features = roles_of(have, data, roles), rows.features  # made anew at each access
    check_columns(features, names, data, by)
    kept = [n for n in have if n in names.values() or is_scalar(features[n])]
    renamed = {source: role for role, source in names.items()}
    for name in kept:
        if name in (*roles, *OURS) and name not in names.values():
            renamed[name] = free_name(name, [*have, *renamed.values()])
            if name == by:
                logger.warning(
                    "partition.column=%s is the column that fedvlm makes; the column '%s' of the "
                    "source is partition.column=%s",
                    name, name, renamed[name],
                )  # fmt: skip
    rows = rows.with_format(None)
    others = [name for name in kept if name not in names.values()]
    # The others stand apart, because each step on a data set takes time for each of its columns.
    few = _named(rows.select_columns(list(names.values())), renamed)
    few = _encoded(with_bytes(few, root), root).add_column("row", numbers)
    parts = [few.select_columns([name]) for name in (*roles, "row")]  # which keeps their order
    rest = [_named(rows.select_columns(others), renamed)] if others else []
    return datasets.concatenate_datasets([*parts, *rest], axis=1)


def _named(rows: datasets.Dataset, renamed: Mapping[str, str]) -> datasets.Dataset:
    """Columns under their new names, and class labels as the names of the classes."""
    features = rows.features
    changed = {name: renamed[name] for name in features if renamed.get(name, name) != name}
    rows = rows.rename_columns(changed) if changed else rows
    for name, feature in features.items():
        if isinstance(feature, datasets.ClassLabel):
            name = changed.get(name, name)
            codes = rows.with_format("arrow")[name][:]
            rows = _replace(rows, name, names_of(feature.names, codes, name))
    return rows


def _replace(rows: datasets.Dataset, name: str, values: Any) -> datasets.Dataset:
    if name in rows.column_names:
        rows = rows.remove_columns(name)
    return rows.add_column(name, values)


def _encoded(rows: datasets.Dataset, root: Path) -> datasets.Dataset:
    """Casts images to ``{"bytes", "path"}`` without decoding, and makes the paths absolute."""
    if is_list(rows.features["image"]):
        return rows  # which have these paths
    rows = rows.cast_column("image", datasets.Image(decode=False))
    images = rows.with_format("arrow")["image"][:]
    embedded = pc.is_valid(pc.struct_field(images, "bytes"))
    if not pc.any(embedded).as_py():
        paths = pc.struct_field(images, "path").to_pylist()
        absolute = [path_of(path, root) if path else None for path in paths]
        rows = _replace(rows, "image", pa.array(absolute, pa.string()))
    elif pc.any(pc.and_not(pc.is_valid(pc.struct_field(images, "path")), embedded)).as_py():
        chunks = [with_absolute_paths(chunk, root) for chunk in images.chunks]
        rows = _replace(rows, "image", pa.chunked_array(chunks))
    return rows.cast_column("image", datasets.Image(decode=False))


# Rows: the sample, and the rows that cannot be used.


def _sample(rows: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    if limit is None or limit >= len(rows):
        return rows
    draw = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(b"sample")]))
    return rows.select(np.sort(draw.choice(len(rows), limit, replace=False)))


def _without_bad_rows(
    rows: datasets.Dataset, data: DataConfig, needed: set[str], problems: Mapping[int, str]
) -> datasets.Dataset:
    """Removes or refuses unusable rows, and adds the column ``image_hash``.

    Args:
        rows: all rows.
        data: the section of the configuration.
        needed: columns that may not be empty.
        problems: row number -> a problem found before.
    """
    few = rows.select_columns(["row", *sorted(needed)])
    numbers = few.with_format("numpy")["row"][:]
    bad: dict[int, str] = {}
    for role in sorted(needed - {"image"}):
        bad.update(dict.fromkeys(_empty(few, role), f"the {shown(role)} is empty"))
    if problems:
        found = np.flatnonzero(np.isin(numbers, list(problems)))
        bad.update({int(at): problems[int(numbers[at])] for at in found})
    if len(bad) == len(rows):
        return without(few, bad, name_of(data), data.on_error)  # refuses
    checked = check_pictures(few, Pictures.of(data))
    bad = {**bad, **checked.broken, **{at: bad[at] for at in bad if numbers[at] in problems}}
    if len(bad) == len(rows) or (bad and data.on_error == "fail"):
        return without(few, bad, name_of(data), data.on_error)  # refuses
    rows = without(with_hashes(rows, checked.hashes), bad, name_of(data), data.on_error)
    checked.report(name_of(data))
    if "rejected" in needed:
        _warn_of_equal_answers(rows, name_of(data))
    return rows


def _warn_of_equal_answers(rows: datasets.Dataset, name: str) -> None:
    table = rows.with_format("arrow")
    one, two = (pc.utf8_trim_whitespace(table[role][:]) for role in ("answer", "rejected"))
    equal = np.flatnonzero(pc.equal(one, two).to_numpy())
    if len(equal):
        logger.warning(
            "%s: %d of %d rows have a rejected answer that equals the answer, such as row %d; "
            "training on pairs learns nothing from them",
            name,
            len(equal),
            len(rows),
            rows[int(equal[0])]["row"],
        )


def _empty(rows: datasets.Dataset, role: str) -> list[int]:
    text = rows.with_format("arrow")[role][:]
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0)
    return np.flatnonzero(pc.fill_null(blank, True).to_numpy(zero_copy_only=False)).tolist()

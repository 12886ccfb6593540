"""The files of a folder: those of a data set, without hidden ones and other programs' leftovers."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from fedvlm.errors import DataError, brief, counted

logger = logging.getLogger("fedvlm")

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # of files of rows
_OTHERS = re.compile(  # endings of files of rows that are not read
    r"\.(csv|tsv|jsonl?|ndjson|parquet)\.\w{1,4}$|\.(pq|arrow|feather|orc|xlsx?|ods|avro)$"
)
_SAVED = ("dataset_dict.json", "state.json")  # in the folder of a saved data set
_METADATA = ("metadata.jsonl", "metadata.csv")
_SPLIT = r"(train|test|validation|val|valid|dev)"


def is_hidden(path: Path, root: Path) -> bool:
    """Whether a file below ``root`` is no data: a name on its way begins with ``.`` or ``_``.

    These are hidden files and folders, such as ``.ipynb_checkpoints`` and ``._1.png``, and
    ``__MACOSX``. Folders above ``root`` do not count.
    """
    return any(part.startswith((".", "_")) for part in path.relative_to(root).parts)


def data_files(folder: Path) -> list[Path]:
    """Lists all files below a folder that are not hidden, sorted by path.

    Links to folders are followed. A file that several links lead to is listed once. A warning
    counts links that lead nowhere.
    """
    found: list[Path] = []
    entered: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        here = Path(where)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(here / name, folder))
        found += [here / name for name in names if not is_hidden(here / name, folder)]
    first: dict[str, Path] = {}
    for path in sorted(found):
        if path.is_file():
            first.setdefault(os.path.realpath(path), path)
    lost = [path for path in sorted(found) if not path.exists()]
    if lost:
        logger.warning(
            "left out %d links below '%s' that lead nowhere, such as '%s'",
            len(lost),
            folder,
            lost[0].name,
        )
    return list(first.values())


def is_saved(folder: Path) -> bool:
    """Whether a folder is a data set of ``save_to_disk``."""
    return any((folder / name).exists() for name in _SAVED)


def files_of_rows(folder: Path, split: str) -> list[Path]:
    """Chooses the files of a folder that are the rows of one split.

    These are ``metadata.jsonl`` or ``metadata.csv``, or else all files of the first suffix of
    :data:`SUFFIXES` that the folder has. A warning counts and names other files of rows.

    Raises:
        DataError: the folder has no such file, or none of this split.
    """
    found = data_files(folder)
    saved = {path.parent for path in found if path.name in _SAVED}
    rows = [path for path in found if not saved & {*path.parents}]
    for name in _METADATA:
        if (folder / name).is_file():
            _report_left_out([folder / name], rows, saved, ())
            return [folder / name]
    kinds = [[path for path in rows if path.name == name] for name in _METADATA]
    kinds += [[path for path in rows if path.suffix.lower() == suffix] for suffix in SUFFIXES]
    for files in filter(None, kinds):
        chosen = _of_split(files, folder, split)
        _report_left_out(chosen, rows, saved, files)
        return chosen
    if saved:
        raise DataError(
            f"the folder '{brief(folder, 200)}' holds {len(saved)} saved data sets, such as "
            f"'{brief(min(saved).relative_to(folder), 80)}': set data.path to one of them, or "
            "save all rows as one data set, with a column that names the client"
        )
    raise DataError(
        f"the folder '{brief(folder, 200)}' holds no parquet, JSONL, JSON or CSV file; a folder "
        "of images needs a metadata.jsonl with lines such as "
        '{"file_name": "1.jpg", "question": "...", "chosen": "..."}'
    )


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Selects the shards of a split, if files or folders have the names of splits.

    Shards are named like ``train.csv`` or ``train-00000-of-00003.parquet``, or lie in a folder
    ``train``. Where the first words of all files are splits, as in ``train-north``, they count too.
    """
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    words = {file: _first_word(file) for file in files}
    if not any(splits.values()):
        if not any(words.values()):
            return files
        if not all(words.values()):
            if len({*words.values()}) > 2:
                logger.warning(
                    "the folder '%s' has files whose names begin like splits, such as '%s', and "
                    "others, such as '%s': all %d are read. Shards are named like "
                    "train-00000.parquet or lie in a folder such as train",
                    brief(folder, 200),
                    brief(next(file.name for file in files if words[file]), 80),
                    brief(next(file.name for file in files if not words[file]), 80),
                    len(files),
                )
            return files
        splits = words
    chosen = [file for file, found in splits.items() if found == split.lower()]
    if not chosen:
        raise DataError(
            f"the folder '{brief(folder, 200)}' has no shards of data.split '{split}'; "
            f"it has those of {', '.join(sorted({*splits.values()} - {''}))}"
        )
    unnamed = [file for file, found in splits.items() if not found]
    if unnamed:
        logger.warning(
            "read %d files of data.split '%s' in '%s'; left out %d files that belong to no split: "
            "%s. Move them to a folder '%s' to read them too",
            len(chosen),
            split,
            brief(folder, 200),
            len(unnamed),
            _named(unnamed),
            split,
        )
    return chosen


def _split_of(path: Path) -> str:
    """The split that a file's name or the nearest folder names; empty if there is none."""
    stem = path.name.removesuffix(path.suffix)
    named = re.fullmatch(_SPLIT + r"([-_.]\d.*)?", stem, re.IGNORECASE)
    if named:
        return named[1].lower()
    folders = (part.lower() for part in reversed(path.parts[:-1]))
    return next((part for part in folders if re.fullmatch(_SPLIT, part)), "")


def _first_word(file: Path) -> str:
    word = re.split(r"[-_.]", file.name)[0].lower()
    return word if re.fullmatch(_SPLIT, word) else ""


def _named(files: Sequence[Path], most: int = 3) -> str:
    more = f" and {len(files) - most} more" if len(files) > most else ""
    return ", ".join(f"'{brief(file.name, 80)}'" for file in files[:most]) + more


def _report_left_out(
    chosen: Sequence[Path], files: Sequence[Path], saved: Collection[Path], known: Sequence[Path]
) -> None:
    """Warns of files of rows that were left out, because files of another kind were read.

    Args:
        chosen: the files that were read.
        files: all files of the folder.
        saved: the folders of saved data sets in it.
        known: files of which the chosen ones are one split.
    """
    others = [path for path in files if path not in {*chosen, *known}]
    kinds: dict[str, list[Path]] = {}
    for path in others:
        if ending := _ending(path):
            kinds.setdefault(ending, []).append(path)
    groups = [(f"{ending} file", found) for ending, found in kinds.items()]
    groups += [("saved data set", sorted(saved))] if saved else []
    parts = [f"{counted(len(found), what)} ({_named(found, 2)})" for what, found in groups]
    if parts:
        logger.warning(
            "read %s, such as '%s'; left out %s in the same folder",
            counted(len(chosen), "file"),
            chosen[0].name,
            ", ".join(sorted(parts)[:8]),
        )


def _ending(path: Path) -> str:
    """The ending of a file of rows; empty for other files."""
    other = _OTHERS.search(path.name.lower())
    if other:
        return other[0]
    return path.suffix.lower() if path.suffix.lower() in SUFFIXES else ""

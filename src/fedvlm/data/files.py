"""The files of a folder: those of a data set, without hidden ones and other programs' leftovers."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger("fedvlm")

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")  # of files of rows


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


def report_left_out(chosen: Sequence[Path], files: Sequence[Path]) -> None:
    """Warns of files of rows that were left out, because files of another kind were read."""
    same = chosen[0].suffix.lower()
    splits = {path for path in files if path.suffix.lower() == same}  # of which one was chosen
    if chosen[0].stem == "metadata":
        splits = {path for path in splits if path.name == chosen[0].name}
    others = [path for path in files if path not in {*chosen, *splits}]
    counts = Counter(p.suffix.lower() for p in others if p.suffix.lower() in SUFFIXES)
    if counts:
        logger.warning(
            "read %d files, such as '%s'; left out %s in the same folder",
            len(chosen),
            chosen[0].name,
            ", ".join(f"{count} {suffix} files" for suffix, count in sorted(counts.items())),
        )

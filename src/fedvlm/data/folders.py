"""The pictures in a folder: by the usual suffixes of picture files, or by their first bytes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedvlm.data import dicom
from fedvlm.data.pictures import Pictures, Refused
from fedvlm.errors import brief

logger = logging.getLogger("fedvlm")

# A file with such a suffix is a picture, and a broken one is an error. The first bytes of all
# other files decide.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".tga", ".ico"),
    *(".dcm", ".dicom"),
)
_ROWS = (".parquet", ".jsonl", ".json", ".csv")
_NAMED = 5  # files whose names a warning lists


@dataclass(frozen=True)
class Found:
    """The files of a folder and its subfolders, sorted.

    Attributes:
        pictures: files that are pictures.
        others: visible files that are not pictures.
        lost: visible links that lead nowhere, pipes and other special files, and folders that
            cannot be read.
        hidden: number of hidden files, and of those in hidden folders.
    """

    pictures: list[Path]
    others: list[Path]
    lost: list[Path]
    hidden: int

    def report(self, folder: Path) -> None:
        """Logs the files that are left out."""
        if self.hidden:
            logger.info("left out %d hidden files in '%s'", self.hidden, brief(str(folder)))
        if n := len(self.others):
            what = "1 file that is no picture" if n == 1 else f"{n} files that are no pictures"
            _warn(what, folder, self.others)
        if self.lost:
            what = "links that lead nowhere, special files or folders that cannot be read"
            _warn(f"{len(self.lost)} {what}", folder, self.lost)


def _warn(what: str, folder: Path, paths: Sequence[Path]) -> None:
    names = [brief(shown_name(path.relative_to(folder)), 80) for path in paths[:_NAMED]]
    more = len(paths) - len(names)
    names += [f"and {more} more"] if more else []
    where = brief(shown_name(folder))
    logger.warning("left out %s in '%s': %s", what, where, ", ".join(names))


def shown_name(path: str | Path) -> str:
    """A path for a message; bytes that are no UTF-8 become escapes, such as ``caf\\xe9.png``."""
    return os.fsencode(path).decode(errors="backslashreplace")


def look_into(folder: Path, pictures: Pictures) -> Found:
    """Finds the pictures in a folder and its subfolders.

    Links to folders are followed, and each folder is entered once.
    """
    files, lost = _walk(folder)
    lost = [path for path in lost if not is_hidden(path.relative_to(folder))]
    found, others, hidden = [], [], 0
    for path in files:
        if is_hidden(path.relative_to(folder)):
            hidden += 1
        elif is_picture(path, pictures):
            found.append(path)
        else:
            others.append(path)
    return Found(found, others, lost, hidden)


def has_rows(folder: Path) -> bool:
    """Whether a folder holds a data set, of pictures with metadata or of rows."""
    names = ("metadata.jsonl", "metadata.csv", "dataset_dict.json", "state.json")
    return any((folder / name).exists() for name in names) or any(
        path.suffix.lower() == ".parquet" and not is_hidden(path.relative_to(folder))
        for path in _walk(folder)[0]
    )


def is_hidden(path: Path) -> bool:
    """Whether a relative path has a hidden part, such as ``._a.png`` or ``__MACOSX``."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def is_picture(path: Path, pictures: Pictures) -> bool:
    """Whether a file has the suffix of a picture, or else begins like one."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or suffix in _ROWS:
        return suffix in SUFFIXES
    try:
        with path.open("rb") as handle:
            if dicom.is_dicom(handle.read(dicom.HEAD)):
                return "DICOM" in pictures.formats
            return pictures.identified(handle, magic=True) is not None
    except Refused:  # above a limit
        return True
    except Exception:  # not readable, or the header of no picture
        return False


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files below a folder, and what is neither a file nor a folder that can be read."""
    found: list[Path] = []
    lost: list[Path] = []
    entered: set[str] = set()

    def unreadable(error: OSError) -> None:
        lost.append(Path(error.filename))

    for where, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(where)
        if real in entered:  # links may make a circle
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        for name in names:
            path = Path(where, name)
            (found if os.path.isfile(path) else lost).append(path)
    return sorted(found), sorted(lost)

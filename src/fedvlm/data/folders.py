"""The pictures in a folder: by the usual suffixes of picture files, or by their first bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedvlm.data import dicom
from fedvlm.data.pictures import Pictures
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
        hidden: number of hidden files, and of those in hidden folders.
    """

    pictures: list[Path]
    others: list[Path]
    hidden: int

    def report(self, folder: Path) -> None:
        """Logs the files that are left out."""
        if self.hidden:
            logger.info("left out %d hidden files in '%s'", self.hidden, brief(str(folder)))
        if self.others:
            names = [brief(str(path.relative_to(folder)), 80) for path in self.others[:_NAMED]]
            n, more = len(self.others), len(self.others) - len(names)
            logger.warning(
                "left out %s in '%s': %s%s",
                "1 file that is no picture" if n == 1 else f"{n} files that are no pictures",
                brief(str(folder)),
                ", ".join(names),
                f", and {more} more" if more else "",
            )


def look_into(folder: Path, pictures: Pictures) -> Found:
    """Finds the pictures in a folder and its subfolders."""
    found, others, hidden = [], [], 0
    for path in _files(folder):
        if is_hidden(path.relative_to(folder)):
            hidden += 1
        elif is_picture(path, pictures):
            found.append(path)
        else:
            others.append(path)
    return Found(found, others, hidden)


def has_rows(folder: Path) -> bool:
    """Whether a folder holds a data set, of pictures with metadata or of rows."""
    names = ("metadata.jsonl", "metadata.csv", "dataset_dict.json", "state.json")
    return any((folder / name).exists() for name in names) or any(
        path.suffix.lower() == ".parquet" and not is_hidden(path.relative_to(folder))
        for path in _files(folder)
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
    except Exception:  # not readable, or the header of no picture
        return False


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())

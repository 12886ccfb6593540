"""Files that show whether they are what was written: digests, and JSON with a seal.

A seal is a digest of the JSON's own content. So a damaged file is an error that names the file, and
never another result. A file of a format that this version does not read is an error too. The seal
itself is the same in all formats.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedvlm.errors import FedVLMError
from fedvlm.store.files import write_text
from fedvlm.version import BY, check_format, written_by

SEAL = "seal"


def damaged(path: str | Path, why: str = "it is not what was written") -> FedVLMError:
    """The error for a damaged file."""
    return FedVLMError(
        f"'{path}' is damaged: {why}; restore this file from a copy, or begin again in another "
        "folder"
    )


def unreadable(path: str | Path, error: OSError) -> FedVLMError:
    """The error for a file that is gone or cannot be read."""
    if isinstance(error, FileNotFoundError):
        return FedVLMError(
            f"'{path}' is missing; restore this file from a copy, or begin again in another folder"
        )
    return damaged(path, error.strerror or str(error))


def blake(content: bytes) -> str:
    """A digest of some bytes, as 32 hexadecimal digits."""
    return hashing(content).hexdigest()


def hashing(content: bytes = b"") -> Any:
    """The hash behind :func:`blake`, for content that comes in pieces."""
    return hashlib.blake2b(content, digest_size=16)


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> digest of the file with this name in the folder.

    Raises:
        FedVLMError: a file is missing or cannot be read.
    """
    found = {}
    for name in names:
        try:
            with open(folder / name, "rb") as f:
                found[name] = hashlib.file_digest(f, hashing).hexdigest()
        except OSError as error:
            raise unreadable(folder / name, error) from error
    return found


def check(folder: Path, known: Mapping[str, str]) -> None:
    """Refuses files that differ from their digests.

    Args:
        folder: the folder of the files.
        known: name -> digest.

    Raises:
        FedVLMError: a file is missing, cannot be read, or has other bytes.
    """
    for name, digest in known.items():
        if digests(folder, [name])[name] != digest:
            raise damaged(folder / name)


def dumps(content: Mapping[str, Any], indent: int | None = 2) -> str:
    """The content as JSON, with the format, the version and the seal."""
    content = {**content, BY: written_by()}
    return json.dumps({**content, SEAL: _seal(content)}, indent=indent) + "\n"


def write(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Writes :func:`dumps` whole or not at all."""
    write_text(path, dumps(content, indent))


def read(path: Path) -> dict[str, Any]:
    """The content of a sealed file, without the seal and the format.

    Raises:
        FedVLMError: the file is missing, is no JSON, has another content than was written, or has
            a format that this version does not read.
    """
    try:
        content = json.loads(path.read_bytes())
        whole = isinstance(content, dict) and content.pop(SEAL, None) == _seal(content)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, nested without end
        raise damaged(path, "it is no JSON as fedvlm writes it") from error
    if not whole:
        raise damaged(path)
    check_format(content, path)
    content.pop(BY, None)
    return content


def _seal(content: Mapping[str, Any]) -> str:
    return blake(json.dumps(content, sort_keys=True).encode())

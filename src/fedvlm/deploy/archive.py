"""A backup as one tar file: every file with its SHA-256, private modes, and nothing but files.

The last member, ``ABOUT``, lists the files with their digests. A backup that was cut, or in which a
byte changed, is refused as a whole. The digests find damage; they do not keep out somebody who
writes another backup.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from fedvlm.errors import FedVLMError, brief, shown
from fedvlm.store.files import sync
from fedvlm.version import BY, check_format, written_by

ABOUT = "fedvlm-backup.json"
LARGEST = 2**26  # bytes of that list
CHUNK = 2**20
PASSING = (".lock", ".restoring")


def below(root: Path, *names: str) -> Iterator[tuple[str, Path]]:
    """The files below some folders of ``root``, and files there, with their names in a backup.

    Locks, unfinished files, reserves of logs and links are left out.
    """
    for name in names:
        found = root / name
        for path in sorted([found] if found.is_file() else found.rglob("*")):
            passing = path.name in PASSING or path.suffix == ".tmp" or path.name.startswith(".")
            if path.is_file() and not path.is_symlink() and not passing:
                yield path.relative_to(root).as_posix(), path


def write(
    target: Path, kind: str, members: Iterable[tuple[str, Path]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Writes a backup, whole or not at all, for its owner alone.

    Args:
        target: the file.
        kind: what is backed up: ``site`` or ``federation``.
        members: names and paths.
        facts: further facts; read after the last member, so that it may be filled meanwhile.

    Returns:
        The content of ``ABOUT``.

    Raises:
        FedVLMError: the file exists, or something cannot be read or written.
    """
    partial = target.with_name(target.name + ".tmp")
    if target.exists():
        raise FedVLMError(f"'{target}' exists: choose another name for the backup")
    listed: dict[str, str] = {}
    try:
        handle = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with (
            os.fdopen(handle, "wb") as raw,
            tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name, path in members:
                with open(path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_SH)  # an audit log is written under this lock
                    reader = _Hashing(file)
                    _add(tar, name, os.fstat(file.fileno()).st_size, reader)
                listed[name] = reader.digest.hexdigest()
            about = {"kind": kind, BY: written_by(), "time": _now(), **facts, "files": listed}
            text = json.dumps(about, indent=1).encode()
            _add(tar, ABOUT, len(text), io.BytesIO(text))
            tar.close()
            raw.flush()
            os.fsync(raw.fileno())
        partial.rename(target)
        sync(target.absolute().parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise FedVLMError(
            f"the backup '{target}' cannot be written: '{error.filename or partial}': "
            f"{error.strerror or error}"
        ) from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return about


def unpack(source: Path, scratch: Path, kind: str) -> dict[str, Any]:
    """Writes the files of a backup into a new folder, and checks all of them.

    Args:
        source: the backup.
        scratch: a folder that does not exist. It is removed if the backup is refused.
        kind: what the backup must hold.

    Returns:
        The content of ``ABOUT``.

    Raises:
        FedVLMError: the file is no such backup, is damaged, or has a newer format.
    """
    if scratch.exists():
        raise FedVLMError(f"'{scratch}' is in the way, perhaps from a restore that was killed")
    scratch.mkdir(parents=True, mode=0o700)
    try:
        about = _unpacked(source, scratch)
        check_format(about, source)
        if about["kind"] != kind:
            raise _no_backup(source, f"it holds a {shown(about['kind'])} and no {kind}")
        for name in ("time", "keys", "ledger"):
            about[name] = about.get(name, "")
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError | tarfile.TarError | ValueError | TypeError | LookupError):
            raise _no_backup(source, brief(error)) from None
        raise
    return about


def _unpacked(source: Path, scratch: Path) -> dict[str, Any]:
    found: dict[str, str] = {}
    about: dict[str, Any] | None = None
    with tarfile.open(source, "r:") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is None or about is not None:
                raise _no_backup(source, f"{shown(member.name)} has no place in it")
            if member.name == ABOUT:
                about = json.loads(content.read(LARGEST))
                continue
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or str(name) != member.name:
                raise _no_backup(source, f"{shown(member.name)} is no name of a file in it")
            found[member.name] = _written(scratch / name, content)
    if about is None:
        raise _no_backup(source, "its end is missing")
    wrong = sorted(n for n in found | about["files"] if found.get(n) != about["files"].get(n))
    if wrong:
        raise _no_backup(source, f"{shown(wrong[0])} is damaged or missing")
    return about


def _written(path: Path, content: IO[bytes]) -> str:
    """Writes a file for its owner alone, and returns its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    reader = _Hashing(content)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        shutil.copyfileobj(reader, file, CHUNK)
        file.flush()
        os.fsync(file.fileno())
    return reader.digest.hexdigest()


class _Hashing(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        found = self.file.read(size)
        self.digest.update(found)
        return found


def _add(tar: tarfile.TarFile, name: str, size: int, content: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    tar.addfile(member, content)


def _no_backup(source: Path, why: str) -> FedVLMError:
    return FedVLMError(f"'{source}' is no whole backup of fedvlm: {why}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""Atomic files, the lock of a folder, and safe names of folders."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedvlm.errors import FedVLMError
from fedvlm.tree import Tree

FULL = {errno.ENOSPC: "is full", errno.EDQUOT: "is full for this user (quota)"}
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)
LONGEST = 240  # bytes of a folder name; file systems take 255, with prefixes and suffixes


@contextlib.contextmanager
def only_one(folder: Path, taken: str, patience: float = 0.0) -> Iterator[None]:
    """Holds the lock of a folder, so that no second process works there.

    The lock ends with its process, however the process ends.

    Args:
        folder: an existing folder.
        taken: error message if another process holds the lock.
        patience: seconds to wait for the other process to end.

    Raises:
        FedVLMError: another process still holds the lock, or the folder cannot be written.
    """
    lock = FileLock(folder / ".lock", thread_local=False)  # any thread may release it
    try:
        with writable(folder):
            held = lock.acquire(timeout=patience, poll_interval=0.5)
    except Timeout:
        raise FedVLMError(taken) from None
    with held:
        yield


def _unfinished(path: Path) -> bool:
    """Whether a killed process left this file half written.

    Our temporary files end in ``.tmp``. Those of safetensors begin with ``.tmp``.
    """
    return path.suffix == ".tmp" or path.name.startswith(".tmp")


def check_room(folder: str | Path, needed: int) -> None:
    """Refuses a folder whose disk has less than ``needed`` bytes free, or taken by the folder.

    Raises:
        FedVLMError: the disk has less; the message has both numbers.
    """
    path = Path(folder).absolute()
    needed -= sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < needed:
        raise FedVLMError(
            f"output: the disk of '{folder}' has {free / 1e6:.1f} MB free, and this run needs "
            f"{needed / 1e6:.1f} MB; free some space, or choose another disk with output=DIR (a "
            "run that has begun: move its folder there)"
        )


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turns an error of the disk into a clear message."""
    try:
        yield
    except OSError as error:
        number = error.errno
        if number in FULL or number == errno.EFBIG:
            why = FULL.get(number or 0, "allows no larger file")
            raise FedVLMError(
                f"the disk of '{folder}' {why}; the finished rounds are safe: free some space, "
                f"then run 'fedvlm run --resume {folder}'"
            ) from error
        if number == errno.EIO:
            raise FedVLMError(
                f"the disk of '{folder}' reports an error ({error.strerror}); check the disk, "
                f"then run 'fedvlm run --resume {folder}'"
            ) from error
        if number in REFUSED:
            raise FedVLMError(
                f"output: '{folder}' cannot be written ({error.strerror}); choose another folder "
                "with output=DIR"
            ) from error
        raise


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turns an error of the disk inside safetensors, which is no ``OSError``, into one."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error


def slugs(clients: Iterable[str]) -> dict[str, str]:
    """Gives every client a distinct folder name that is readable and safe.

    A name has at most 243 bytes, so that a prefix such as ``client-`` and a suffix such as ``.tmp``
    fit. Names are distinct on file systems that ignore case or normalize Unicode, too.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    tried: dict[str, int] = {}  # name -> how many clients wanted it
    for client in clients:
        name = re.sub(r"[^\w.-]+", "-", client).strip(".-")[:80]
        name = base = _shortened(name, LONGEST) or "client"
        while _same(name) in taken:
            tried[_same(base)] = tried.get(_same(base), 1) + 1
            number = f"-{tried[_same(base)]}"
            name = _shortened(base, LONGEST + 3 - len(number)) + number
        taken.add(_same(name))
        found[client] = name
    return found


def _shortened(text: str, most: int) -> str:
    """The longest beginning of a text that takes at most this number of bytes."""
    return text.encode()[:most].decode(errors="ignore")


def _same(name: str) -> str:
    """Equal for names that some file system does not tell apart."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all, and syncs it to the disk."""
    write_bytes(path, text.encode())


def save_tree(path: Path, tree: Tree) -> bytes:
    """Writes tensors whole or not at all, and returns the content of the file.

    The caller syncs the file, see :func:`sync`.
    """
    from safetensors import numpy, torch

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tree.items()}
    try:
        content = numpy.save({name: tensor.numpy() for name, tensor in whole.items()})
    except TypeError:  # numpy has no bfloat16; this way takes four times as long
        content = torch.save(whole)
    write_bytes(path, content, durable=False)
    return content


def save_stacked(path: Path, tree: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Writes tensors and metadata whole or not at all, without a copy of them in memory."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors():
        save_file(dict(tree), temporary, dict(about))
    os.replace(temporary, path)


def load_tree(path: Path) -> Tree:
    """Reads the tensors of a file, to the CPU."""
    from safetensors.torch import load

    return load(path.read_bytes())


def append_line(path: Path, line: dict[str, Any]) -> bytes:
    """Appends one JSON line, and returns its bytes."""
    content = (json.dumps(line) + "\n").encode()
    with open(path, "ab") as f:
        f.write(content)
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the JSON lines of a file. A last line without its end is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.split("\n") if line]  # other breaks are text


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes a file whole or not at all.

    Args:
        path: the file; its folder is made if there is none.
        data: its content.
        durable: sync the file and its folder, so that it survives a loss of power.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            if durable:
                os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk needs its bytes
        raise
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Waits until the disk holds a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(paths: Sequence[Path]) -> None:
    """Syncs files and folders at the same time: a journal writes once what waits together."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(sync, paths))

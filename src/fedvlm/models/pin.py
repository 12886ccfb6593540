"""The digest of a model's folder, by which a site's policy names the one model that it allows.

The digest covers every file of the folder, so it covers whatever transformers reads: the index and
all files of weights, the configurations, the processor, the tokenizer and the chat templates.
Hidden files and folders are left out (``.cache`` of the hub's downloader, ``.git``), and nothing
may refer to them or to files outside of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvlm.errors import FedVLMError, brief
from fedvlm.models.folder import ADAPTER, DOCUMENTS, check_folder, weights_of

UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf")
"""Endings of files of weights that are not safetensors; loading some of them can run code."""
SETTINGS = tuple(name for name in DOCUMENTS if name not in ("tokenizer.json", "added_tokens.json"))
"""The files whose settings can refer to other files."""


@dataclass(frozen=True)
class Pin:
    """A model's folder at one moment.

    Attributes:
        folder: its path without symbolic links.
        digest: SHA-256 of the sorted lines that ``sha256sum`` prints for its files.
        stamps: the file system's identity of the folder and of each file: device, inode, size,
            and the times of the last changes. A user who writes a file, or replaces it and puts
            it back, cannot restore the time of the change of the inode.
    """

    folder: str
    digest: str
    stamps: tuple[tuple[str, tuple[int, ...]], ...]


def pin(folder: str | Path) -> Pin:
    """Hashes a model's folder.

    Raises:
        FedVLMError: the folder is no whole model, or holds or names files that cannot be pinned:
            weights other than safetensors, an adapter, files outside of it. The message names no
            path above the folder.
    """
    root = os.path.realpath(folder)
    if not os.path.isdir(root):
        raise FedVLMError("a digest belongs to a model's folder, and there is no such folder")
    try:
        _check(root)
    except FedVLMError as error:
        raise FedVLMError(str(error).replace(brief(root), "…")) from None
    before = _stamps(root)
    lines = []
    for name in _names(root):
        with open(os.path.join(root, name), "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    found = Pin(root, hashlib.sha256("".join(lines).encode()).hexdigest(), before)
    unchanged(found)
    return found


def unchanged(pinned: Pin) -> None:
    """Refuses a folder in which anything was written, added or replaced since it was hashed.

    Raises:
        FedVLMError: names a changed file.
    """
    known, now = dict(pinned.stamps), dict(_stamps(pinned.folder))
    changed = sorted(name for name in known.keys() | now.keys() if known.get(name) != now.get(name))
    if changed:
        raise FedVLMError(
            "the model's folder was changed after its digest was compared "
            f"({brief(', '.join(changed))}): let nobody but its owner write there, and begin again"
        )


_ALLOWED: dict[str, Pin] = {}


def allow(folder: str | Path, digest: str) -> None:
    """Compares a folder with its digest. From now on, :func:`still_allowed` compares it again.

    Raises:
        FedVLMError: the folder has another digest, or none, see :func:`pin`.
    """
    found = pin(folder)
    if found.digest != digest:
        raise FedVLMError(f"the digest of its folder is {found.digest}, and not {digest}")
    _ALLOWED[found.folder] = found


def still_allowed(folder: str | Path) -> None:
    """Refuses a folder that has changed since :func:`allow`, after it was loaded.

    Raises:
        FedVLMError: names a changed file.
    """
    pinned = _ALLOWED.get(os.path.realpath(folder))
    if pinned:
        unchanged(pinned)


def _check(root: str) -> None:
    names = _names(root)
    for name in names:
        if name.lower().endswith(UNSAFE):
            raise FedVLMError(
                f"its folder holds '{brief(name)}', and a model with a digest has its weights as "
                "safetensors only: remove this file"
            )
    if ADAPTER in names:
        raise FedVLMError(f"its folder holds {ADAPTER}, which adds an adapter: remove it")
    check_folder(root)
    for shard in weights_of(root):
        if os.path.normpath(shard) not in names:
            raise FedVLMError(f"its index names '{brief(shard)}', which its digest does not cover")
    for name in SETTINGS:
        if name in names:
            document = json.loads(Path(root, name).read_text(encoding="utf-8"))
            for key, value in _settings(document):
                if value and (key.endswith(("_file", "_files")) or key in _ELSEWHERE):
                    raise FedVLMError(
                        f"its {name} has '{brief(key)}', which may name files that its digest does "
                        "not cover: remove this setting"
                    )


_ELSEWHERE = ("transformers_weights", "use_pretrained_backbone")


def _settings(document: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of a JSON document, however they are nested."""
    inner = document.values() if isinstance(document, dict) else document
    if isinstance(document, dict):
        yield from document.items()
    for value in inner if isinstance(document, dict | list) else ():
        yield from _settings(value)


def _names(root: str) -> list[str]:
    """The paths of all files relative to the folder, sorted, without hidden ones.

    Raises:
        FedVLMError: something is neither a file nor a folder, or links to a folder.
    """
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            if os.path.islink(path) and os.path.isdir(path):
                raise FedVLMError(f"'{brief(name)}' in its folder is a link to another folder")
        for name in files:
            path = os.path.join(folder, name)
            if name.startswith("."):
                continue
            if not os.path.isfile(path) or not name.isprintable():
                raise FedVLMError(f"'{brief(name)}' in its folder is no file with a plain name")
            found.append(os.path.relpath(path, root))
    return sorted(found)


def _stamps(root: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The identities of the folder, and of its files: of each link, and of what it links to."""
    found = []
    for name in (".", *_names(root)):
        path = os.path.join(root, name)
        both = []
        for stat in (os.lstat(path), os.stat(path)):
            times = () if name == "." else (stat.st_size, stat.st_mtime_ns)
            both += [stat.st_dev, stat.st_ino, *times, stat.st_ctime_ns]
        found.append((name, tuple(both)))
    return tuple(found)

"""Tensors on disk, read back memory-mapped, for data that does not fit in memory."""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALIGN = 64  # bytes; tensors of any type may start there


@dataclass(frozen=True)
class Place:
    """Where a tensor is in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Spool:
    """A file without a name; it disappears with the process, however the process ends.

    Args:
        folder: a folder on the disk to use.
        budget: largest size in bytes. At most half of the free space is used.
    """

    def __init__(self, folder: Path, budget: int):
        self._folder = folder
        self._budget = budget
        self._end = 0
        self._file: Any = None

    def put(self, found: Any) -> Any:
        """Writes the tensors of dicts and sequences.

        Returns:
            The same structure with places instead of tensors; None if the tensors no longer fit or
            the disk refuses them.
        """
        if self._end + nbytes(found) + ALIGN * len(leaves(found)) > self._budget:
            return None
        try:
            if self._file is None:
                self._open()
            return each(found, self._write)
        except OSError:
            self._budget = 0
            return None

    def get(self, places: Any) -> Any:
        """The tensors at these places; their pages are read on first use."""
        return each(places, self._read)

    def _open(self) -> None:
        folder = self._folder
        while not folder.exists():
            folder = folder.parent
        self._budget = min(self._budget, shutil.disk_usage(folder).free // 2)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._file.truncate(self._budget)  # sparse: takes no room before it is written
        self._map = mmap.mmap(self._file.fileno(), self._budget)

    def _write(self, tensor: Tensor) -> Place:
        data = tensor.detach().to("cpu").contiguous()
        place = Place(self._end, tuple(data.shape), data.dtype)
        raw = data.flatten().view(torch.uint8).numpy().tobytes()
        written = 0
        while written < len(raw):
            written += os.pwrite(self._file.fileno(), raw[written:], place.offset + written)
        self._end += math.ceil(len(raw) / ALIGN) * ALIGN
        return place

    def _read(self, place: Place) -> Tensor:
        if not math.prod(place.shape):
            return torch.empty(place.shape, dtype=place.dtype)
        size = math.prod(place.shape)
        flat = torch.frombuffer(self._map, dtype=place.dtype, count=size, offset=place.offset)
        return flat.view(place.shape)


def each(found: Any, do: Callable[[Any], Any]) -> Any:
    """Applies ``do`` to every leaf of dicts and sequences."""
    if isinstance(found, dict):
        return {name: each(value, do) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [each(value, do) for value in found]
    return do(found)


def leaves(found: Any) -> list[Tensor]:
    """The tensors of dicts and sequences."""
    kept: list[Tensor] = []
    each(found, kept.append)
    return kept


def nbytes(found: Any) -> int:
    """Bytes of the tensors, however they are nested."""
    return sum(t.numel() * t.element_size() for t in leaves(found))

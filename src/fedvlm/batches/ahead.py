"""Rows encoded once, ahead of training, and kept on disk for later runs.

``datasets.Dataset.map`` writes tokens and pixels into one Arrow file, each row's features as
safetensors bytes, or the reason why it has none. The file is read back memory-mapped. Its name is a
hash of everything that determines its content: the rows, the pictures' files, the processor and the
versions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from torch import Tensor

from fedvlm.batches.prompts import Features, Prompter
from fedvlm.data.pictures import Pictures
from fedvlm.data.scenes import cache_folder
from fedvlm.data.sources import quiet
from fedvlm.errors import DataError
from fedvlm.version import __version__

BUFFER = 1 << 26  # bytes per write


class Encoded:
    """The encoded rows of a data set, by position."""

    def __init__(self, table: datasets.Dataset):
        self._table = table

    def __getitem__(self, index: int) -> Features:
        from safetensors.torch import load

        return unpacked(load(self._table[int(index)]["features"]))

    @property
    def problems(self) -> list[str]:
        """The reason why a row cannot be encoded, by position; empty for a row that is encoded."""
        return self._table["problem"][:]

    @property
    def cuts(self) -> list[int]:
        """The number of tokens that were cut off a row's answers, by position."""
        return self._table["cut"][:]


def encode_ahead(
    rows: datasets.Dataset,
    encode: Callable[[int], Features],
    *,
    key: str,
    budget: int,
    told: Callable[[int, int], None],
) -> Encoded | None:
    """Encodes all rows, or reads the rows that an earlier run encoded.

    Args:
        rows: from :func:`fedvlm.data.sources.load_rows`.
        encode: a row's position -> its features.
        key: from :func:`fingerprint`.
        budget: most bytes on disk. Files of other data sets are removed to make room, the least
            recently used first.
        told: called with the number of encoded rows and of all rows.

    Returns:
        The encoded rows; None if they do not fit or the disk refuses them. Training then encodes
        the rows itself.

    """
    from safetensors.torch import save

    path = cache_folder() / f"encoded-{key}.arrow"

    def one(index: int) -> dict[str, Any]:
        try:
            row = encode(index)
        except DataError as error:
            return {"features": b"", "problem": str(error), "cut": 0}
        return {"features": save(packed(row)), "problem": "", "cut": row.cut}

    sizes = (len(one(index)["features"]) for index in range(len(rows)))
    size = next(filter(None, sizes), 0)  # of the first row that can be encoded
    if size * len(rows) > budget:
        return None

    def told_one(row: Any, index: int) -> dict[str, Any]:
        told(index + 1, len(rows))
        return one(index)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_room(path, budget - size * len(rows))
        with quiet():
            table = rows.select_columns(["row"]).map(
                told_one,
                with_indices=True,
                remove_columns=["row"],
                features=datasets.Features(
                    {
                        "features": datasets.Value("large_binary"),
                        "problem": datasets.Value("string"),
                        "cut": datasets.Value("int64"),
                    }
                ),
                cache_file_name=str(path),
                new_fingerprint=key,
                writer_batch_size=max(1, BUFFER // max(1, size)),
            )
        os.utime(path)  # marks the file as used now
    except OSError:
        return None
    return Encoded(table)


def fingerprint(
    rows: datasets.Dataset,
    prompter: Prompter,
    roles: Sequence[str],
    pictures: Pictures | None = None,
) -> str:
    """A hash of everything that determines the rows' features."""
    processor, tokenizer = prompter.processor, prompter.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "rows": [rows._fingerprint, len(rows), _files(rows)],
        "pictures": (pictures or Pictures()).key(),
        "processor": processor.to_json_string(),
        "template": getattr(processor, "chat_template", None),
        "tokenizer": backend.to_str() if backend else str(sorted(tokenizer.get_vocab().items())),
        "model": [prompter.family, sorted(prompter.ends), prompter.limit, prompter.max_length],
        "form": [2, prompter.new_tokens],
        "roles": list(roles),
        "versions": [__version__, *map(version, ("transformers", "tokenizers", "pillow"))],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _files(rows: datasets.Dataset) -> str:
    """A hash of the times and sizes of pictures that are separate files."""
    digest = hashlib.sha256()
    for batch in rows.select_columns(["image"]).with_format("arrow").iter(batch_size=100):
        for chunk in batch["image"].chunks:
            pictures = chunk.flatten() if pa.types.is_list(chunk.type) else chunk
            outside = pictures.field("bytes").is_null()
            for path in filter(None, pictures.field("path").filter(outside).to_pylist()):
                stat = os.stat(path)
                digest.update(f"{path}\0{stat.st_mtime_ns}\0{stat.st_size}\0".encode())
    return digest.hexdigest()


def _make_room(path: Path, budget: int) -> None:
    """Removes encoded rows of other data sets, the least recently used first."""
    others = [p for p in path.parent.glob("encoded-*.arrow") if p != path]
    for other in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True):
        budget -= other.stat().st_size
        if budget < 0:
            other.unlink(missing_ok=True)


def packed(row: Features) -> dict[str, Tensor]:
    """A row's tensors by name."""
    named = {"prompt": row.prompt}
    named |= {f"answer.{n}": ids for n, ids in enumerate(row.answers)}
    named |= {f"aligned.{name}": t for name, t in row.aligned.items()}
    named |= {f"extras.{name}": t for name, t in row.extras.items()}
    return {name: t.contiguous() for name, t in named.items()}


def unpacked(named: dict[str, Tensor]) -> Features:
    """The inverse of :func:`packed`."""

    def of(group: str) -> dict[str, Tensor]:
        return {
            n.removeprefix(f"{group}."): t for n, t in named.items() if n.startswith(f"{group}.")
        }

    answers = of("answer")
    ordered = tuple(answers[str(n)] for n in range(len(answers)))
    return Features(named["prompt"], ordered, of("aligned"), of("extras"))

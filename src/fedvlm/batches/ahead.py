"""Rows encoded once, ahead of training, and kept on disk for later runs.

``datasets.Dataset.map`` writes tokens and pixels into one Arrow file, each row's features as
safetensors bytes, or the reason why it has none. The file is read back memory-mapped. Its name is a
hash of everything that determines its content: the rows, the pictures' files, the processor and the
versions.

Rows are encoded in the order of their pictures, so that each picture is opened and processed once.
The file holds the pixels of a picture once too: a row whose inputs other than the text equal those
of an earlier row has the place of that row instead.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from torch import Tensor

from fedvlm.batches.places import equal
from fedvlm.batches.prompts import Features, Prompter
from fedvlm.batches.texts import TOGETHER
from fedvlm.data.fingerprint import PICTURE
from fedvlm.data.pictures import Pictures
from fedvlm.data.scenes import cache_folder
from fedvlm.data.sources import quiet
from fedvlm.errors import DataError
from fedvlm.version import __version__

BUFFER = 1 << 26  # bytes per write
Encode = Callable[[Sequence[int]], Iterator[Features | DataError]]
"""The positions of rows -> their features, or the reason why a row has none."""


class Encoded:
    """The encoded rows of a data set, by position.

    Args:
        table: the rows, in the order of the file.
        order: the position of each row of the file.
    """

    def __init__(self, table: datasets.Dataset, order: np.ndarray):
        self._table = table
        self._places = np.argsort(order)

    def __getitem__(self, index: int) -> Features:
        place = int(self._places[int(index)])
        row = self._table[place]
        named = _loaded(row)
        if row["picture"] != place:
            named |= _pixels(_loaded(self._table[row["picture"]]))
        return unpacked(named)

    @property
    def problems(self) -> list[str]:
        """The reason why a row cannot be encoded, by position; empty for a row that is encoded."""
        return self._column("problem")

    @property
    def cuts(self) -> list[int]:
        """The number of tokens that were cut off a row's answers, by position."""
        return self._column("cut")

    def _column(self, name: str) -> list[Any]:
        values = self._table[name][:]
        return [values[place] for place in self._places]


def encode_ahead(
    rows: datasets.Dataset,
    encode: Encode,
    *,
    key: str,
    budget: int,
    told: Callable[[int, int], None],
) -> Encoded | None:
    """Encodes all rows, or reads the rows that an earlier run encoded.

    Args:
        rows: from :func:`fedvlm.data.sources.load_rows`.
        encode: encodes rows; those of one picture are neighbours.
        key: from :func:`fingerprint`.
        budget: most bytes on disk. Files of other data sets are removed to make room, the least
            recently used first.
        told: called with the number of encoded rows and of all rows.

    Returns:
        The encoded rows; None if they do not fit or the disk refuses them. Training then encodes
        the rows itself.

    """
    from safetensors import numpy
    from safetensors.torch import save

    path = cache_folder() / f"encoded-{key}.arrow"
    order, pictures = by_picture(rows)
    size, text = _sizes(encode, order)
    expected = size * pictures + text * (len(rows) - pictures)
    if expected > budget:
        return None
    place, pixels = 0, dict[str, Tensor]()  # of the last picture in the file

    def one(row: Features | DataError, at: int) -> tuple[bytes, int, str, int]:
        nonlocal place, pixels
        told(at + 1, len(rows))
        if isinstance(row, DataError):
            return b"", at, str(row), 0
        if not equal(row.extras, pixels):
            place, pixels = at, row.extras
        if place == at:
            return save(packed(row)), place, "", row.cut
        text = packed(replace(row, extras={}))
        return numpy.save({n: t.numpy() for n, t in text.items()}), place, "", row.cut

    def some(_: Any, places: Sequence[int]) -> dict[str, Any]:
        encoded = encode([int(order[at]) for at in places])
        columns = zip(*map(one, encoded, places), strict=True)
        names = ("features", "picture", "problem", "cut")
        return dict(zip(names, map(list, columns), strict=True))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_room(path, budget - expected)
        with quiet():
            table = rows.select_columns(["row"]).map(
                some,
                with_indices=True,
                batched=True,
                batch_size=max(1, min(TOGETHER, BUFFER // max(1, size))),
                remove_columns=["row"],
                features=datasets.Features(
                    {
                        "features": datasets.Value("large_binary"),
                        "picture": datasets.Value("int64"),
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
    return Encoded(table, order)


def by_picture(rows: datasets.Dataset) -> tuple[np.ndarray, int]:
    """The positions of the rows, those of one picture in a row, and the number of pictures."""
    if PICTURE not in rows.column_names:
        return np.arange(len(rows)), len(rows)
    hashes = np.asarray(rows[PICTURE][:])
    unreadable = int((hashes == "").sum())
    return np.argsort(hashes, kind="stable"), len(set(hashes.tolist()) - {""}) + unreadable


def _sizes(encode: Encode, order: np.ndarray) -> tuple[int, int]:
    """Bytes of the first row that can be encoded, and bytes of its text alone."""
    from safetensors.torch import save

    for index in order:
        (row,) = encode([int(index)])
        if isinstance(row, DataError):
            continue
        return len(save(packed(row))), len(save(packed(replace(row, extras={}))))
    return 0, 0


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
        "form": [3, prompter.new_tokens],
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


def _loaded(row: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(row["features"])


def _pixels(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in named.items() if name.startswith("extras.")}


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

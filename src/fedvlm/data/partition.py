"""Assigns rows to clients, and splits each client's rows into train, val and test.

Each way to assign rows is one function from labels to index arrays. The split inside a client does
not depend on it. :class:`Partition` also holds the skew of the clients.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedvlm.data import assign, explicit
from fedvlm.data.clusters import check_installed, cluster_codes
from fedvlm.data.columns import SHOWN, TEXT, is_scalar, kind_of, listed
from fedvlm.data.groups import (
    image_groups,
    joined,
    same_pictures,
    warn_of_equal_pictures,
    warn_of_shared_images,
)
from fedvlm.data.labels import binned_codes, codes_of, values_of
from fedvlm.data.skew import Skew, frequent, measure
from fedvlm.errors import DataError, brief
from fedvlm.settings.sections import Config, PartitionConfig

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger("fedvlm")

SPLITS = ("train", "val", "test")
_LIKELY = 200  # most different values of a column that may name clients


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """One client's rows: int64 positions in the data set, in a random order set by the seed."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    def __len__(self) -> int:
        return len(self.train) + len(self.val) + len(self.test)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Split) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in SPLITS
        )


@dataclass(frozen=True)
class Partition:
    """The rows of each client, and how much the clients differ.

    Attributes:
        kind: how the rows were assigned (``auto`` is resolved).
        label: the column whose skew was measured.
        clients: the names of the clients, in order.
        splits: client -> its rows.
        skew: client -> how its labels differ from the labels of all rows.
        frequent: at most twelve labels: the most frequent ones, and those of clients that have few
            of the most frequent ones.
    """

    kind: str
    label: str
    clients: tuple[str, ...]
    splits: dict[str, Split]
    skew: dict[str, Skew]
    frequent: tuple[str, ...]

    @cached_property
    def weights(self) -> dict[str, float]:
        """Client -> its weight in a mean, which is its number of training rows."""
        return {client: float(len(split.train)) for client, split in self.splits.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """Client -> its number of ``train``, ``val`` and ``test`` rows."""
        return {
            client: {name: len(getattr(split, name)) for name in SPLITS}
            for client, split in self.splits.items()
        }

    def mean_divergence(self) -> float:
        """Mean of :attr:`Skew.divergence` over the clients, unweighted."""
        return float(np.mean([skew.divergence for skew in self.skew.values()]))

    def table(self, top: int = 3, most: int | None = None) -> str:
        """Formats the skew as plain text, one line per client.

        Args:
            top: number of a client's most frequent labels to show.
            most: number of clients to show; None shows all.
        """
        shown = self.clients[:most]
        lines = [["client", *SPLITS, "divergence", f"most frequent {self.label}"]]
        for client in shown:
            split, skew = self.splits[client], self.skew[client]
            often = ", ".join(
                f"{brief(t, 24)} {100 * n / len(split):.0f} %" for t, n in skew.top[:top]
            )
            numbers = [str(len(getattr(split, name))) for name in SPLITS]
            lines.append([client, *numbers, f"{skew.divergence:.3f}", often])
        if left := len(self.clients) - len(shown):
            lines.append([f"and {left} more", *[""] * 5])
        splits = self.splits.values()
        totals = [str(sum(len(getattr(s, name)) for s in splits)) for name in SPLITS]
        lines.append(["all", *totals, f"{self.mean_divergence():.3f}", "(mean divergence)"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i in (0, 5) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def to_dict(self) -> dict[str, Any]:
        """Gives plain lists, numbers and strings, for JSON. :meth:`from_dict` reads them back."""
        return {
            "kind": self.kind,
            "label": self.label,
            "frequent": list(self.frequent),
            "clients": [
                {
                    "client": client,
                    **{name: getattr(self.splits[client], name).tolist() for name in SPLITS},
                    **self.skew[client].to_dict(),
                }
                for client in self.clients
            ],
        }

    @classmethod
    def read(cls, folder: Path) -> Partition | None:
        """The partition in a run's folder; None for a deployed run, whose rows are not here."""
        path = folder / "partition.json"
        return cls.from_dict(json.loads(path.read_bytes())) if path.exists() else None

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Partition:
        """Reads the partition that :meth:`to_dict` wrote.

        Raises:
            DataError: ``tree`` does not have that form.
        """
        try:
            splits, skew = {}, {}
            for entry in tree["clients"]:
                arrays = (np.asarray(entry[name], dtype=np.int64) for name in SPLITS)
                splits[entry["client"]] = Split(*arrays)
                skew[entry["client"]] = Skew.from_dict(entry)
            often = tuple(map(str, tree["frequent"]))
            return cls(tree["kind"], tree["label"], tuple(splits), splits, skew, often)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"this is not a saved partition ({type(error).__name__}: {error}); make it again "
                "with make_partition"
            ) from error


def make_partition(rows: datasets.Dataset, config: Config) -> Partition:
    """Assigns every row to one client, and there to train, val or test.

    The kinds (``partition.kind``) are:

    * ``iid``: equal sizes, at random.
    * ``dirichlet``: label skew by Dirichlet draws (introduced by Hsu et al., arXiv 1909.06335). It
      has the form that is usual today, one draw over the clients for each label, so that sizes
      differ too.
    * ``shards``: rows sorted by label and dealt in shards (McMahan et al., arXiv 1602.05629).
    * ``column``: one client for each value of a column.
    * ``quantity``: sizes by a power law.
    * ``explicit``: the row numbers in ``partition.lists``.
    * ``auto``: by ``partition.column`` if it is set, by the column ``site`` for the bundled scenes,
      and ``iid`` for other data, with a warning.

    Labels are the answers, or ``partition.column`` (many different numbers are put into ten bins of
    equal counts), or ``partition.clusters`` of the answers.

    A client needs ``partition.min_rows`` rows, and at least two: one to train and one to test. Rows
    that share an image stay together inside a client: rows with the same ``image_path``, or without
    this column the same file or the same bytes. Images have the same random rank in all clients, so
    that most images land in the same split everywhere. If ``partition.splits`` is ``alone``, a
    client's split depends on its own rows only.

    The result depends only on the rows, the sections ``data`` and ``partition``, and ``seed``. The
    split of a client's rows uses ``data.split_seed`` instead of ``seed`` where it is set.

    Raises:
        DataError: a column does not exist, there are too few rows, a client is too small, or lists
            do not name every row.
    """
    settings = config.partition
    check_installed(settings)
    kind, column = _kind(rows, config)
    least = max(2, settings.min_rows)
    label = _resolve(rows, column, config) if column and kind != "column" else "answer"
    values = values_of(rows, label)
    as_text = label in ("answer", "question", "rejected")
    if settings.clusters:
        label = "answer cluster"
        drawn = int(_rng(config.seed, "clusters").integers(2**31))
        codes, names = cluster_codes(values.tolist(), settings.clusters, drawn)
    else:
        codes, names = binned_codes(values, as_text=as_text)
    if kind == "column":
        name = _resolve(rows, column or "", config)
        parts = assign.by_column(values_of(rows, name), name, least)
    elif kind == "explicit":
        parts = _listed(rows, config, least)
    elif kind == "shards" and not settings.clusters:  # sorts numbers by value, not by bin
        parts = _assigned(codes_of(values, as_text=as_text)[0], kind, config, least)
    else:
        parts = _assigned(codes, kind, config, least)
    groups = _groups(rows, config)
    seed = config.seed if config.data.split_seed is None else config.data.split_seed
    rank = _rng(seed, "split").permutation(groups.max() + 1)
    splits = {}
    for name, part in parts.items():
        own, order = groups[part], rank
        if settings.splits == "alone":
            own = np.unique(own, return_inverse=True)[1]
            order = _rng(seed, "split").permutation(own.max() + 1)
        splits[name] = _split(name, part, order[own], own, config)
    warn_of_shared_images(splits, groups)
    if "image_path" in rows.column_names:
        warn_of_equal_pictures(splits, same_pictures(rows))
    often = frequent(codes, list(parts.values()), len(names))
    skew = dict(zip(parts, measure(codes, list(parts.values()), names, often), strict=True))
    return Partition(kind, label, tuple(parts), splits, skew, tuple(names[i] for i in often))


def _groups(rows: datasets.Dataset, config: Config) -> np.ndarray:
    """The number of each row's group; the rows of a group land in one split of a client.

    They are the rows of an image, and the rows of a protected unit (``privacy.unit``).
    """
    groups, unit = image_groups(rows), config.privacy.column
    if unit is None:
        return groups
    return joined(groups, values_of(rows, _resolve(rows, unit, config, "privacy.unit")))


def _rng(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]))


def _kind(rows: datasets.Dataset, config: Config) -> tuple[str, str | None]:
    """The kind and the column of a partition, where ``partition.kind=auto`` is resolved."""
    settings = config.partition
    if settings.kind != "auto":
        return settings.kind, settings.column
    if settings.column:
        logger.info(
            "partition.column=%s: one client for each value (partition.kind=column)",
            brief(settings.column),
        )
        return "column", settings.column
    if config.data.path is None:
        return ("column", "site") if "site" in rows.column_names else ("iid", None)
    if settings.clients == PartitionConfig().clients:
        named = [f"{brief(name, 40)} ({count} values)" for name, count in _likely(rows).items()]
        logger.warning(
            "no partition is set: the rows are dealt at random to %d clients that are alike. For "
            "one client for each value of a column, set partition.column=NAME%s. To keep random "
            "clients, set partition.kind=iid",
            settings.clients,
            f"; columns that may name clients: {', '.join(named[:8])}" if named else "",
        )
    return "iid", None


def _likely(rows: datasets.Dataset) -> dict[str, int]:
    """The columns of text that may name clients, and their numbers of different values."""
    ours = ("question", "answer", "rejected", "image_path", "image_hash", SHOWN)
    texts = [
        name
        for name, feature in rows.features.items()
        if name not in ours and getattr(feature, "dtype", "") in TEXT
    ]
    counts = {name: len(set(values_of(rows, name).tolist()) - {""}) for name in texts}
    return {name: count for name, count in counts.items() if 2 <= count <= _LIKELY}


def _resolve(
    rows: datasets.Dataset, column: str, config: Config, setting: str = "partition.column"
) -> str:
    """The canonical name of a column: in loaded rows, ``chosen`` is ``answer``."""
    if column not in rows.column_names:
        source = config.data.columns
        column = {source.answer: "answer", source.question: "question"}.get(column, column)
    feature = rows.features.get(column)
    usable = [name for name, kind in rows.features.items() if is_scalar(kind)]
    if column not in usable:
        holds = f" (it holds {kind_of(feature)})" if feature is not None else ""
        raise DataError(
            f"{setting} '{brief(column)}'{holds} is not a column to group rows by; "
            f"the data has the columns {listed(usable)}"
        )
    return column


def _listed(rows: datasets.Dataset, config: Config, least: int) -> dict[str, np.ndarray]:
    lists = config.partition.lists
    lists = explicit.read(lists) if isinstance(lists, str) else lists or {}
    known = "row" in rows.column_names
    numbers = np.asarray(rows["row"][:]) if known else np.arange(len(rows))
    some_left_out = config.data.max_rows is not None or config.data.on_error == "skip"
    parts = explicit.by_lists(numbers, lists, some_left_out)
    assign.check_sizes(parts, least, "partition.lists", "or list more rows for these clients")
    return parts


def _assigned(codes: np.ndarray, kind: str, config: Config, least: int) -> dict[str, np.ndarray]:
    settings, count = config.partition, len(codes)
    if settings.clients * least > count:
        raise DataError(
            f"partition.clients={settings.clients} with at least {least} rows each "
            f"(partition.min_rows, and one row to train and one to test) need "
            f"{settings.clients * least} rows, but there are {count}: lower partition.clients or "
            "partition.min_rows, or use more data"
        )
    rng = _rng(config.seed, kind)
    if kind == "dirichlet":
        parts = assign.dirichlet(codes, settings, least, rng)
    elif kind == "shards":
        parts = assign.shards(codes, settings, least, rng)
    elif kind == "quantity":
        sizes = assign.power_law(count, settings, least)
        parts = np.split(rng.permutation(count), np.cumsum(sizes)[:-1])
    else:
        parts = np.array_split(rng.permutation(count), settings.clients)
    return {f"client-{k}": np.sort(part) for k, part in enumerate(parts)}


# Train, val, test inside a client.


def _split(
    client: str, part: np.ndarray, rank: np.ndarray, groups: np.ndarray, config: Config
) -> Split:
    """Splits a client's rows into train, val and test.

    Args:
        client: its name.
        part: its rows.
        rank: for each row, the rank of its image. Rows are split in this order.
        groups: for each row, the number of its image.
        config: of the run.
    """
    places = np.argsort(rank, kind="stable")
    order = part[places]
    starts = np.flatnonzero(np.diff(groups[places])) + 1
    if not len(starts):
        raise DataError(
            f"client '{brief(client)}' has {len(part)} rows of a single image (the same "
            "image_path, file or bytes), so it cannot test on another image than it trains on: "
            "give it more images, or use another partition.kind or a larger partition.min_rows"
        )
    held = min(len(part) - 1, max(1, round(len(part) * config.data.test_fraction)))
    wanted = round(len(part) * config.data.val_fraction)
    if len(starts) == len(part) - 1:  # no two rows share an image
        last = held + min(len(part) - held - 1, wanted)
        return Split(order[last:], order[held:last], order[:held])
    blocks = np.split(order, starts)
    test, rest = _take(blocks, held)
    if not test:
        at = min(range(len(blocks)), key=lambda i: len(blocks[i]))
        test, rest = [blocks[at]], blocks[:at] + blocks[at + 1 :]
    left = sum(map(len, rest))
    val, train = _take(rest, min(left - 1, wanted))
    return Split(_joined(train), _joined(val), _joined(test))


def _take(blocks: list[np.ndarray], rows: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Takes the blocks, in order, that fit into ``rows`` rows. Returns those and the others."""
    taken: list[np.ndarray] = []
    left: list[np.ndarray] = []
    for block in blocks:
        fits = len(block) <= rows
        (taken if fits else left).append(block)
        rows -= len(block) if fits else 0
    return taken, left


def _joined(blocks: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *blocks]).astype(np.int64)

"""The clients' personal states, stored as a log of packs.

A pack is a safetensors file with the states of one pass of clients. Its name is
``personal/RRRRR-NNNNN.safetensors``: R is the round, N the position of the pass's first client in
the cohort. A pack has one matrix ``[clients, elements]`` for each data type. A client's row holds
its tensors of that type one after another, ordered by name, so that a state is read in one piece.
The metadata lists the clients in the order of the rows, the tensors with their types and shapes,
and a checksum (CRC-32) of every row. It begins with a digest of itself, which the checkpoint
repeats beside the pack's name. So a read checks the rows that it reads and no others. Clients with
other tensors, types or shapes are stored in separate packs. Each of these has the position of its
own first client in its name.

The newest row of a client is its state. Older rows are dead. A pack without live rows is removed.
When the dead rows of all packs take more bytes than the live ones, the packs with the largest share
of dead rows are merged into ``RRRRR-merged-NNNNN.safetensors``, and no more packs than necessary.
In total, merging copies no more bytes than the rounds wrote. The places of all rows are in memory.
They are read from the files' headers at the start.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm.store import sealed
from fedvlm.store.files import save_stacked, sync
from fedvlm.tree import Described, Tree, described, joined

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"\d+-(merged-)?\d+\.safetensors")
MERGED = 2**26  # approximate size of a merged pack, in bytes


@dataclass(eq=False, slots=True)
class Pack:
    """A file of stacked states.

    Attributes:
        path: the file.
        rows: number of states in the file.
        live: number of states that are the newest of their client.
        share: bytes of the file per row.
        seal: the digest of the file's metadata.
    """

    path: Path
    rows: int
    live: int
    share: int
    seal: str


@dataclass(frozen=True, slots=True)
class About:
    """The metadata of a pack.

    Attributes:
        clients: the clients in the order of the rows.
        tensors: name, data type and shape of each tensor, ordered by name.
        sums: the checksum of each row.
        seal: the digest of all these.
    """

    clients: list[str]
    tensors: list[tuple[str, str, list[int]]]
    sums: list[int]
    seal: str


class Packs:
    """The packs in one folder, and the places of their live rows.

    Args:
        folder: the folder.
        last: the last finished round. Packs of later rounds in the folder are ignored.
        known: name -> seal of the packs at the end of that round; None: all packs are valid.

    Raises:
        FedVLMError: a known pack is missing or damaged.
    """

    def __init__(self, folder: Path, last: int, known: Mapping[str, str] | None = None):
        self.folder = folder
        self._packs: dict[Path, Pack] = {}  # packs with a live row
        self._places: dict[str, tuple[Pack, int]] = {}
        self._dead: set[Path] = set()
        self._fresh: list[Path] = []  # written, and perhaps not synced
        self._bytes = self._live = 0  # bytes of all rows of _packs, and of the live rows
        self._early = ThreadPoolExecutor(1)
        paths = [path for path in self._files() if _round(path) <= last]
        if known is not None:
            paths = sorted((folder / name for name in known), key=_order)
        for path in paths:
            about = _about(path)
            if known is not None and about.seal != known[path.name]:
                raise sealed.damaged(path, "it is another pack than the run wrote")
            self._enter(path, about)
        self._fresh = []

    @classmethod
    def rewound(
        cls,
        folder: Path,
        last: int,
        known: Mapping[str, str] | None = None,
        kept: Collection[str] = (),
    ) -> Packs:
        """Opens the packs up to round ``last``; removes all others, but those named ``kept``."""
        packs = cls(folder, last, known)
        for path in packs._files():
            if path not in packs._packs and path.name not in kept:
                path.unlink()
        packs._dead = set()
        return packs

    def names(self) -> dict[str, str]:
        """The names of the packs with live rows, and their seals."""
        return {path.name: pack.seal for path, pack in sorted(self._packs.items())}

    # -- states

    def read(self, clients: Sequence[str]) -> list[Tree]:
        """Reads the states of some clients. Each file is opened once.

        Returns:
            The states in the order of ``clients``; empty for a client without a state.
        """
        found: list[Tree] = [{} for _ in clients]
        wanted: dict[Pack, list[tuple[int, Tree]]] = {}
        for client, tree in zip(clients, found, strict=True):
            if client in self._places:
                pack, row = self._places[client]
                wanted.setdefault(pack, []).append((row, tree))
        for pack, places in wanted.items():
            for (_, tree), state in zip(places, _states(pack, [r for r, _ in places]), strict=True):
                tree |= state
        return found

    def write(self, round_: int, position: int, kept: Mapping[str, Tree]) -> None:
        """Saves the states of one pass.

        Args:
            round_: the round.
            position: position of the pass's first client in the cohort.
            kept: client -> its state. Clients with an empty state are left out.
        """
        positions = {client: position + n for n, client in enumerate(kept)}
        for group in _alike(kept):
            self._write(f"{round_:05d}-{positions[next(iter(group))]:05d}", group)

    def _write(self, name: str, kept: Mapping[str, Tree]) -> None:
        first = next(iter(kept.values()))
        form = [(at, str(t.dtype), list(t.shape)) for at, t in sorted(first.items())]
        names: dict[str, list[str]] = {}
        for at, kind, _ in form:
            names.setdefault(kind, []).append(at)
        stacked = {
            kind: joined([tree[at] for tree in kept.values() for at in own])
            .view(len(kept), -1)
            .cpu()
            for kind, own in names.items()
        }
        path = self.folder / f"{name}.safetensors"
        about = About(list(kept), form, _sums(stacked), "")
        text = json.dumps([about.clients, about.tensors, about.sums])
        about = replace(about, seal=sealed.blake(text.encode()))
        save_stacked(path, stacked, {"pack": about.seal + text})  # one entry: their order varies
        self._enter(path, about)
        self._early.submit(sync, path)  # during training; the commit syncs once more

    # -- live and dead rows

    def refresh(self, round_: int) -> None:
        """Adds the packs of a round that other processes wrote, merged packs included."""
        for path in self._files():
            if _round(path) == round_ and path not in self._packs:
                self._enter(path, _about(path))

    def _files(self) -> list[Path]:
        found = self.folder.glob("*.safetensors")
        return sorted((path for path in found if NAME.fullmatch(path.name)), key=_order)

    def _enter(self, path: Path, about: About) -> None:
        """Adds a pack whose rows are newer than all earlier rows of its clients."""
        rows = len(about.clients)
        pack = Pack(path, rows, rows, path.stat().st_size // rows, about.seal)
        self._packs[path] = pack
        self._fresh.append(path)
        self._bytes += rows * pack.share
        self._live += rows * pack.share
        for row, client in enumerate(about.clients):
            if client in self._places:
                self._supersede(self._places[client][0])
            self._places[client] = pack, row

    def _supersede(self, pack: Pack) -> None:
        """Marks one row of a pack as dead."""
        pack.live -= 1
        self._live -= pack.share
        if not pack.live:
            self._bytes -= pack.rows * pack.share
            if self._packs.get(pack.path) is pack:  # unless a new file has replaced it
                del self._packs[pack.path]
                self._dead.add(pack.path)

    # -- the end of a round

    def settle(self, round_: int) -> list[Path]:
        """Merges the packs with the most dead rows, before a round is committed.

        Returns:
            The files and folders to sync before the commit.
        """
        number = 0
        for clients in self._mergers():
            kept = dict(zip(clients, self.read(clients), strict=True))
            for group in _alike(kept):
                self._write(f"{round_:05d}-merged-{number:05d}", group)
                number += 1
        fresh = [path for path in self._fresh if path in self._packs]
        self._fresh = []
        return [*fresh, self.folder] if fresh else []

    def sweep(self, kept: Collection[str] = ()) -> None:
        """Removes the packs without live rows, but those named, after a round is committed."""
        for path in self._dead - self._packs.keys():
            if path.name not in kept:
                path.unlink(missing_ok=True)
        self._dead = set()

    def _mergers(self) -> Iterator[list[str]]:
        """Yields the live clients of the packs to merge, for one merged pack at a time."""
        batch: list[str] = []
        size = 0
        for pack in self._mostly_dead():
            named = enumerate(_about(pack.path).clients)
            batch += [client for row, client in named if self._places[client] == (pack, row)]
            size += pack.live * pack.share
            if size >= MERGED:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _mostly_dead(self) -> list[Pack]:
        """Chooses packs to merge until the dead rows take no more bytes than the live ones.

        The packs with the smallest share of live rows come first.
        """
        excess = self._bytes - 2 * self._live
        chosen: list[Pack] = []
        if excess > 0:
            for pack in sorted(self._packs.values(), key=lambda p: (p.live / p.rows, p.path.name)):
                if excess <= 0:
                    break
                chosen.append(pack)
                excess -= (pack.rows - pack.live) * pack.share
        return chosen


def _about(path: Path) -> About:
    """Reads the metadata of a pack from the header of its file.

    Raises:
        FedVLMError: the file is missing or damaged.
    """
    from safetensors import safe_open

    with _readable(path), safe_open(path, "pt") as file:
        return _head(path, file)


def _head(path: Path, file: Any) -> About:
    """The same for an open file."""
    found = file.metadata()["pack"]
    seal, text = found[:32], found[32:]
    if sealed.blake(text.encode()) != seal:
        raise sealed.damaged(path)
    clients, tensors, sums = json.loads(text)
    return About(clients, tensors, sums, seal)


def _states(pack: Pack, rows: Sequence[int]) -> list[Tree]:
    """Reads some rows of a pack and checks them. The file is opened once.

    Raises:
        FedVLMError: the file is missing or damaged.
    """
    from safetensors import safe_open

    with _readable(pack.path), safe_open(pack.path, "pt") as file:
        about = _head(pack.path, file)
        kinds = sorted({kind for _, kind, _ in about.tensors})
        if about.seal != pack.seal or sorted(file.keys()) != kinds:
            raise sealed.damaged(pack.path)
        runs = _runs(rows)
        read = [{kind: file.get_slice(kind)[a:b] for kind in kinds} for a, b in runs]
    found: dict[int, Tree] = {}
    for (first, end), stacked in zip(runs, read, strict=True):
        if any(str(part.dtype) != kind for kind, part in stacked.items()):
            raise sealed.damaged(pack.path)
        if _sums(stacked) != about.sums[first:end]:
            raise sealed.damaged(pack.path)
        found |= zip(range(first, end), _cut(stacked, about.tensors), strict=True)
    return [found[row] for row in rows]


def _sums(stacked: Mapping[str, Tensor]) -> list[int]:
    """The checksum of each row, over the row's tensors in the order of their data types."""
    import torch

    totals = [0] * len(next(iter(stacked.values())))
    for kind in sorted(stacked):
        if stacked[kind].numel():
            bits = stacked[kind].view(torch.uint8).numpy()
            totals = [zlib.crc32(row, total) for row, total in zip(bits, totals, strict=True)]
    return totals


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns the errors of a damaged file into one that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise sealed.unreadable(path, error) from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise sealed.damaged(path, str(error)[:200] or "it cannot be read") from error


def _round(path: Path) -> int:
    return int(path.name.split("-")[0])


def _order(path: Path) -> tuple[int, str]:
    return _round(path), path.name


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """The rows as runs of neighbours, each with its first row and its end."""
    runs: list[tuple[int, int]] = []
    for row in sorted(set(rows)):
        if runs and runs[-1][1] == row:
            runs[-1] = runs[-1][0], row + 1
        else:
            runs.append((row, row + 1))
    return runs


def _cut(stacked: Mapping[str, Tensor], form: Sequence[tuple[str, str, list[int]]]) -> list[Tree]:
    """Cuts clients' rows into their tensors, which are views.

    Args:
        stacked: data type -> the rows ``[clients, elements]``.
        form: name, data type and shape of each tensor, ordered by name.
    """
    sizes: dict[str, list[int]] = {kind: [] for kind in stacked}
    for _, kind, shape in form:
        sizes[kind].append(math.prod(shape))
    parts = {kind: iter(stacked[kind].split(own, 1)) for kind, own in sizes.items()}
    count = len(next(iter(stacked.values())))
    columns = [next(parts[kind]).view(count, *shape).unbind() for _, kind, shape in form]
    names = [name for name, _, _ in form]
    return [dict(zip(names, own, strict=True)) for own in zip(*columns, strict=True)]


def _alike(kept: Mapping[str, Tree]) -> Iterable[dict[str, Tree]]:
    """Groups the clients that have a state by the names, shapes and types of their tensors."""
    forms: dict[Described, frozenset[Any]] = {}  # without the order of the tensors
    groups: dict[frozenset[Any], dict[str, Tree]] = {}
    for client, tree in kept.items():
        if tree:
            form = described(tree)
            if form not in forms:
                forms[form] = frozenset(zip(*form, strict=True))
            groups.setdefault(forms[form], {})[client] = tree
    return groups.values()

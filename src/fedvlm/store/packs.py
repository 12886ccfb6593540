"""The clients' personal states, stored as a log of packs.

A pack is a safetensors file with the states of one pass of clients. Its name is
``personal/RRRRR-NNNNN.safetensors``: R is the round, N the position of the pass's first client in
the cohort. A pack has one matrix ``[clients, elements]`` for each data type. A client's row holds
its tensors of that type one after another, ordered by name, so that a state is read in one piece.
The metadata lists the clients in the order of the rows, and the tensors with their types and
shapes. Clients with other tensors, types or shapes are stored in separate packs. Each of these has
the position of its own first client in its name.

The newest row of a client is its state. Older rows are dead. A pack without live rows is removed.
When the dead rows of all packs take more bytes than the live ones, the packs with the largest share
of dead rows are merged into ``RRRRR-merged-NNNNN.safetensors``, and no more packs than necessary.
In total, merging copies no more bytes than the rounds wrote. The places of all rows are in memory.
They are read from the files' headers at the start.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm.store.files import sync
from fedvlm.tree import Tree

if TYPE_CHECKING:
    from torch import Tensor

MERGED = 2**26  # approximate size of a merged pack, in bytes


@dataclass(eq=False, slots=True)
class Pack:
    """A file of stacked states.

    Attributes:
        path: the file.
        rows: number of states in the file.
        live: number of states that are the newest of their client.
        share: bytes of the file per row.
    """

    path: Path
    rows: int
    live: int
    share: int


class Packs:
    """The packs in one folder, and the places of their live rows.

    Args:
        folder: the folder.
        last: the last finished round. Packs of later rounds in the folder are ignored.
    """

    def __init__(self, folder: Path, last: int):
        self.folder = folder
        self._packs: dict[Path, Pack] = {}  # packs with a live row
        self._places: dict[str, tuple[Pack, int]] = {}
        self._dead: set[Path] = set()
        self._fresh: list[Path] = []  # written, and perhaps not synced
        self._bytes = self._live = 0  # bytes of all rows of _packs, and of the live rows
        self._early = ThreadPoolExecutor(1)
        for path in self._files():
            if _round(path) <= last:
                self._enter(path, _clients(path))
        self._fresh = []

    @classmethod
    def rewound(cls, folder: Path, last: int) -> Packs:
        """Opens the packs up to round ``last``; removes later ones and those without live rows."""
        packs = cls(folder, last)
        for path in packs._files():
            if _round(path) > last:
                path.unlink()
        packs.sweep()
        return packs

    # -- states

    def read(self, clients: Sequence[str]) -> list[Tree]:
        """Reads the states of some clients. Each file is opened once.

        Returns:
            The states in the order of ``clients``; empty for a client without a state.
        """
        from safetensors import safe_open

        found: list[Tree] = [{} for _ in clients]
        wanted: dict[Pack, list[tuple[int, Tree]]] = {}
        for client, tree in zip(clients, found, strict=True):
            if client in self._places:
                pack, row = self._places[client]
                wanted.setdefault(pack, []).append((row, tree))
        for pack, places in wanted.items():
            with safe_open(pack.path, "pt") as file:
                form = json.loads(file.metadata()["pack"])["tensors"]
                flat = {
                    kind: _rows(file.get_slice(kind), [row for row, _ in places])
                    for kind in file.keys()  # noqa: SIM118
                }
                for n, (_, tree) in enumerate(places):
                    tree |= _cut({kind: rows[n] for kind, rows in flat.items()}, form)
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
        import torch
        from safetensors.torch import save_file

        first = next(iter(kept.values()))
        form = [(name, str(t.dtype), list(t.shape)) for name, t in sorted(first.items())]
        stacked = {
            kind: torch.stack(
                [
                    torch.cat([tree[name].flatten() for name, of, _ in form if of == kind])
                    for tree in kept.values()
                ]
            )
            for kind in {of for _, of, _ in form}
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.safetensors"
        temporary = path.with_name(path.name + ".tmp")
        about = json.dumps({"clients": list(kept), "tensors": form})
        save_file(stacked, temporary, {"pack": about})  # of several, the order is not fixed
        os.replace(temporary, path)
        self._enter(path, list(kept))
        self._early.submit(sync, path)  # during training; the commit syncs once more

    # -- live and dead rows

    def refresh(self, round_: int) -> None:
        """Adds the packs of a round that other processes wrote, merged packs included."""
        for path in self._files():
            if _round(path) == round_ and path not in self._packs:
                self._enter(path, _clients(path))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"), key=lambda p: (_round(p), p.name))

    def _enter(self, path: Path, clients: Sequence[str]) -> None:
        """Adds a pack whose rows are newer than all earlier rows of its clients."""
        rows = len(clients)
        pack = Pack(path, rows, rows, path.stat().st_size // rows)
        self._packs[path] = pack
        self._fresh.append(path)
        self._bytes += rows * pack.share
        self._live += rows * pack.share
        for row, client in enumerate(clients):
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

    def sweep(self) -> None:
        """Removes the packs without live rows, after a round is committed."""
        for path in self._dead - self._packs.keys():
            path.unlink(missing_ok=True)
        self._dead = set()

    def _mergers(self) -> Iterator[list[str]]:
        """Yields the live clients of the packs to merge, for one merged pack at a time."""
        batch: list[str] = []
        size = 0
        for pack in self._mostly_dead():
            named = enumerate(_clients(pack.path))
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


def _clients(path: Path) -> list[str]:
    """Reads the clients of a pack, in the order of its rows, from the header of the file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["pack"])["clients"]


def _round(path: Path) -> int:
    return int(path.name.split("-")[0])


def _rows(stacked: Any, rows: Sequence[int]) -> list[Tensor]:
    """Reads some rows of a tensor in a file, in one piece if they are neighbours."""
    low, high = min(rows), max(rows) + 1
    if high - low != len(rows):
        return [stacked[row] for row in rows]
    part = stacked[low:high]
    return [part[row - low] for row in rows]


def _cut(row: Mapping[str, Tensor], form: Sequence[tuple[str, str, list[int]]]) -> Tree:
    """Cuts a client's rows, one for each data type, into its tensors, which are views.

    Args:
        row: data type -> the client's row.
        form: name, data type and shape of each tensor, ordered by name.
    """
    ends = dict.fromkeys(row, 0)
    tree = {}
    for name, kind, shape in form:
        begin, ends[kind] = ends[kind], ends[kind] + math.prod(shape)
        tree[name] = row[kind][begin : ends[kind]].view(shape)
    return tree


def _alike(kept: Mapping[str, Tree]) -> Iterable[dict[str, Tree]]:
    """Groups the clients that have a state by the names, shapes and types of their tensors."""
    groups: dict[frozenset[Any], dict[str, Tree]] = {}
    for client, tree in kept.items():
        if tree:
            form = frozenset((name, t.shape, t.dtype) for name, t in tree.items())
            groups.setdefault(form, {})[client] = tree
    return groups.values()

"""What clients keep, as a log of packs: one safetensors file for every pass of clients.

``personal/RRRRR-NNNNN.safetensors`` holds what a pass of round R's clients keeps, the first of
them at position N of the cohort. A client's tensors lie behind one another in its row, ordered by
name, of a matrix ``[clients, elements]`` for each type, so that a state is read in one piece. The
metadata names the clients in the order of the rows, and the tensors with their types and shapes.
Clients whose tensors differ in these lie in packs of their own, each at the position of its first
client.

The newest row of a client is its state; older ones are dead. A pack whose rows are all dead is
removed. When dead rows outweigh the live ones, the packs with the largest share of dead rows are
merged into ``RRRRR-merged-NNNNN.safetensors``, just as many as it takes; that copies no more bytes
than were written since. Which row is where is in memory, and read from the files' headers at first.
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

MERGED = 2**26  # bytes of a merged pack, about


@dataclass(eq=False, slots=True)
class Pack:
    """A file of stacked states.

    Attributes:
        path: the file.
        rows: how many states it holds.
        live: how many of them are their client's newest.
        share: bytes of the file a row.
    """

    path: Path
    rows: int
    live: int
    share: int


class Packs:
    """The packs in one folder, and which of their rows are live.

    Args:
        folder: where they are.
        last: the last round that counts; what this process adds is of later ones.
    """

    def __init__(self, folder: Path, last: int):
        self.folder = folder
        self._packs: dict[Path, Pack] = {}  # those with a live row
        self._places: dict[str, tuple[Pack, int]] = {}
        self._dead: set[Path] = set()
        self._fresh: list[Path] = []  # not known to be on the disk for good
        self._bytes = self._live = 0  # of all rows of these packs, and of the live ones
        self._early = ThreadPoolExecutor(1)
        for path in self._files():
            if _round(path) <= last:
                self._enter(path, _clients(path))
        self._fresh = []

    @classmethod
    def rewound(cls, folder: Path, last: int) -> Packs:
        """The packs up to round ``last``: later ones and those without a live row are removed."""
        packs = cls(folder, last)
        for path in packs._files():
            if _round(path) > last:
                path.unlink()
        packs.sweep()
        return packs

    # -- states

    def read(self, clients: Sequence[str]) -> list[Tree]:
        """What each client keeps; empty for one that has kept nothing. A file is opened once."""
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
        """Saves what the clients of a pass keep; nothing of one that keeps nothing."""
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
        save_file(stacked, temporary, {"pack": about})  # one entry: several have no fixed order
        os.replace(temporary, path)
        self._enter(path, list(kept))
        self._early.submit(sync, path)  # while others train; the commit makes sure

    # -- which rows are live

    def refresh(self, round_: int) -> None:
        """Takes notice of a round's packs that other processes wrote, merged ones included."""
        for path in self._files():
            if _round(path) == round_ and path not in self._packs:
                self._enter(path, _clients(path))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"), key=lambda p: (_round(p), p.name))

    def _enter(self, path: Path, clients: Sequence[str]) -> None:
        """A pack whose rows are newer than all others of their clients."""
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
        """One of its rows is dead."""
        pack.live -= 1
        self._live -= pack.share
        if not pack.live:
            self._bytes -= pack.rows * pack.share
            if self._packs.get(pack.path) is pack:  # not written anew
                del self._packs[pack.path]
                self._dead.add(pack.path)

    # -- the end of a round

    def settle(self, round_: int) -> list[Path]:
        """Before a round is committed: merges what is mostly dead.

        Returns:
            What the disk has to hold before the round counts.
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
        """After it is committed: removes the packs without a live row."""
        for path in self._dead - self._packs.keys():
            path.unlink(missing_ok=True)
        self._dead = set()

    def _mergers(self) -> Iterator[list[str]]:
        """The live clients of the packs to merge, those of one merged pack at a time."""
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
        """As many packs, those with the least alive first, as leave no more dead than live."""
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
    """The clients of a pack, row by row; only its header is read."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["pack"])["clients"]


def _round(path: Path) -> int:
    return int(path.name.split("-")[0])


def _rows(stacked: Any, rows: Sequence[int]) -> list[Tensor]:
    """Rows of a tensor in a file: in one piece where they are neighbours."""
    low, high = min(rows), max(rows) + 1
    if high - low != len(rows):
        return [stacked[row] for row in rows]
    part = stacked[low:high]
    return [part[row - low] for row in rows]


def _cut(row: Mapping[str, Tensor], form: Sequence[tuple[str, str, list[int]]]) -> Tree:
    """A client's tensors out of its row of every type; views of it."""
    ends = dict.fromkeys(row, 0)
    tree = {}
    for name, kind, shape in form:
        begin, ends[kind] = ends[kind], ends[kind] + math.prod(shape)
        tree[name] = row[kind][begin : ends[kind]].view(shape)
    return tree


def _alike(kept: Mapping[str, Tree]) -> Iterable[dict[str, Tree]]:
    """The clients that keep something, those whose tensors can be stacked together."""
    groups: dict[frozenset[Any], dict[str, Tree]] = {}
    for client, tree in kept.items():
        if tree:
            form = frozenset((name, t.shape, t.dtype) for name, t in tree.items())
            groups.setdefault(form, {})[client] = tree
    return groups.values()

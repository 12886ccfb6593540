"""A run's folder: personal states, server checkpoints and metrics, atomic and resumable.

Layout::

    config.yaml  environment.json  partition.json      written once, before the first round
    partition.png                                      the clients' sizes and labels
    checkpoint.json                                    {"round": n}: the last finished round
    server/00007.safetensors                           the server's state after round 7
    personal/00007-00016.safetensors                   states of a pass of clients, since round 7
    metrics.jsonl  timing.jsonl                        one line per round
    answers/  adapters/  groups.csv  table.csv  curves.png  table.json     written at the end

A round's files are written first, each with an atomic rename, and synced to the disk. The round
counts once ``checkpoint.json`` names it. A process that is killed at any moment leaves the last
finished round whole. Resuming a run removes the files of later rounds. :mod:`fedvlm.store.packs`
describes the packs in ``personal``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fedvlm.errors import FedVLMError
from fedvlm.store.files import (
    _unfinished,
    append_line,
    load_tree,
    only_one,
    read_lines,
    save_tree,
    sync,
    writable,
    write_text,
)
from fedvlm.store.packs import Packs
from fedvlm.tree import Tree

CONFIG = "config.yaml"
DONE = "table.json"


class Store:
    """The folder of one run. A process that writes must hold its lock, see :meth:`locked`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @cached_property
    def _packs(self) -> Packs:
        return Packs(self.folder / "personal", self._last)

    # -- once per run

    def create(self, files: Mapping[str, str]) -> None:
        """Writes the files that describe the run, ``config.yaml`` last, because it marks a run."""
        for name, text in sorted(files.items(), key=lambda item: item[0] == CONFIG):
            write_text(self.folder / name, text)
        sync(self.folder.absolute().parent)

    @contextlib.contextmanager
    def locked(self, patience: float = 0.0) -> Iterator[None]:
        """Holds the lock of the folder, so that no second process works on this run.

        Args:
            patience: seconds to wait for another process that is about to end.

        Raises:
            FedVLMError: another process holds the lock, or the folder cannot be written.
        """
        with writable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        taken = (
            f"another process is working on the run in '{self.folder}'; wait for it, or choose "
            "another folder with output=DIR"
        )
        with only_one(self.folder, taken, patience), writable(self.folder):
            yield

    # -- rounds

    def finished(self) -> int | None:
        """The number of the last finished round; None if there is none."""
        path = self.folder / "checkpoint.json"
        return json.loads(path.read_text())["round"] if path.exists() else None

    @property
    def _last(self) -> int:
        done = self.finished()
        return -1 if done is None else done

    def rewind(self) -> None:
        """Removes the files and lines that a killed process left of an unfinished round."""
        last = self._last
        for path in self._states():
            if int(path.stem) > last:
                path.unlink()
        for path in filter(_unfinished, self.folder.rglob("*.*")):
            path.unlink()
        self._packs = Packs.rewound(self.folder / "personal", last)
        for name in ("metrics.jsonl", "timing.jsonl"):
            lines = [line for line in read_lines(self.folder / name) if line["round"] <= last]
            write_text(self.folder / name, "".join(json.dumps(line) + "\n" for line in lines))

    def personal(self, clients: Sequence[str]) -> list[Tree]:
        """Reads the states of some clients; a state is empty before the client's first round."""
        return self._packs.read(clients)

    def keep(self, round_: int, position: int, kept: Mapping[str, Tree]) -> None:
        """Saves the states of one pass of clients, as one file.

        Args:
            round_: the round.
            position: position of the pass's first client in the round's cohort.
            kept: client -> its state. Clients with an empty state are left out.
        """
        self._packs.write(round_, position, kept)

    def refresh(self, round_: int) -> None:
        """Adds the states that other processes wrote in ``round_``; only file headers are read.

        The process that commits a round must call this before the commit. The others must call it
        after the commit, because the commit may merge old packs into new ones.
        """
        self._packs.refresh(round_)

    def server(self) -> Tree:
        """The server's state after the last finished round."""
        return load_tree(self.folder / "server" / f"{self.finished():05d}.safetensors")

    def commit(
        self, round_: int, state: Tree, line: dict[str, Any], timing: dict[str, Any]
    ) -> None:
        """Finishes a round: writes its state and lines, then the checkpoint, then cleans up."""
        fresh = self._packs.settle(round_)
        server = self.folder / "server" / f"{round_:05d}.safetensors"
        save_tree(server, state)
        fresh += [server, server.parent]
        for name, new in (("metrics.jsonl", line), ("timing.jsonl", timing)):
            append_line(self.folder / name, new)
            fresh.append(self.folder / name)
        for path in fresh:  # in one go, which a journal can write at once
            sync(path)
        write_text(self.folder / "checkpoint.json", json.dumps({"round": round_}) + "\n")
        for old in self._states()[:-1]:
            old.unlink()
        self._packs.sweep()

    def _states(self) -> list[Path]:
        return sorted((self.folder / "server").glob("*.safetensors"))

    def lines(self) -> list[dict[str, Any]]:
        """The metrics so far, one dict per round."""
        return read_lines(self.folder / "metrics.jsonl")


def check_version(folder: str | Path) -> None:
    """Refuses a run of version 0.1, whose settings and files have another form.

    Raises:
        FedVLMError: naming the version that opens it.
    """
    path = Path(folder) / "environment.json"
    try:
        made = json.loads(path.read_text(encoding="utf-8"))["packages"]["fedvlm"]
    except (OSError, ValueError, KeyError, TypeError):  # the run says so where it matters
        return
    if str(made).startswith("0.1."):
        raise FedVLMError(
            f"the run in '{folder}' was made by fedvlm {made}, whose runs this version cannot open "
            "or resume; use pip install 'fedvlm<0.2' for it"
        )


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (Path(folder) / CONFIG).exists()


def is_done(folder: str | Path) -> bool:
    """Whether a folder holds a finished run."""
    return is_run(folder) and (Path(folder) / DONE).exists()


def check_fresh(folder: str | Path) -> None:
    """Refuses an output folder that holds something.

    Raises:
        FedVLMError: it holds a run (the message has the command that continues it) or other files.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise FedVLMError(f"output: '{path}' is a file; choose a folder with output=DIR")
    if is_run(path):
        state = "a finished run" if is_done(path) else "an unfinished run"
        hint = "" if is_done(path) else f"continue it with 'fedvlm run --resume {path}', or "
        raise FedVLMError(f"output: '{path}' holds {state}; {hint}choose another with output=DIR")
    if path.exists() and any(p.name != ".lock" and not _unfinished(p) for p in path.iterdir()):
        raise FedVLMError(
            f"output: '{path}' is not empty and holds no run; choose another folder with output=DIR"
        )

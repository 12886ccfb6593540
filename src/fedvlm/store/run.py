"""A run's folder: personal states, server checkpoints and metrics, atomic and resumable.

Layout::

    config.yaml  environment.json                      written once, before the first round
    partition.json  data.json  model.json              the clients' rows; hashes of rows and model
    partition.png                                      the clients' sizes and labels
    checkpoint.json                                    the last finished round, and digests
    server/00007.safetensors                           the server's state after round 7
    personal/00007-00016.safetensors                   states of a pass of clients, since round 7
    metrics.jsonl  timing.jsonl                        one line per round
    answers/  adapters/  groups.csv  table.csv  curves.png  table.json     written at the end
    report.html                                        made from the other files, by commands

A round's files are written first, each with an atomic rename, and synced to the disk. The round
counts once ``checkpoint.json`` names it. A process that is killed at any moment leaves the last
finished round whole. Resuming a run removes the files of later rounds. :mod:`fedvlm.store.packs`
describes the packs in ``personal``.

``checkpoint.json`` has the digests of the files that were written once, of the server's state and
of the lines of metrics, and it names the packs. ``table.json`` has the digests of the answers and
adapters. Both have a seal, see :mod:`fedvlm.store.sealed`. ``timing.jsonl``, the CSV files, the
pictures and the report are not needed to resume or to open a run, and have no digests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fedvlm.errors import FedVLMError
from fedvlm.store import sealed
from fedvlm.store.files import (
    _unfinished,
    append_line,
    only_one,
    save_tree,
    sync,
    sync_all,
    writable,
    write_bytes,
    write_text,
)
from fedvlm.store.made import check_version
from fedvlm.store.marks import (
    BEFORE,
    CHECKPOINT,
    DONE,
    FINISHED,
    PLANNED,
    STATE,
    goes_on,
)
from fedvlm.store.packs import Packs
from fedvlm.tree import Tree

CONFIG = "config.yaml"
METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
SITES = "sites.json"  # of a deployed run: the sites, with the rows that they report
REPORT = "report.html"
FILES: tuple[str, ...] = (
    CONFIG,
    "environment.json",
    "partition.json",
    "data.json",
    "model.json",
    SITES,
    "canaries.json",
    CHECKPOINT,
)
FILES += (METRICS, TIMING, DONE, "table.csv", "groups.csv", "partition.png", "curves.png", ".lock")
AUDIT = ("audit.jsonl", ".audit.jsonl.reserve")  # of a deployed run; it begins before the run does
FILES += (*AUDIT, "audit.json", REPORT)
_WRITTEN = ("server", "personal", "answers", "adapters", "uploads")
FOLDERS = (*_WRITTEN, "onboarded", "export")


class Store:
    """The folder of one run. A process that writes must hold its lock, see :meth:`locked`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._metrics: Any = None  # the hash of metrics.jsonl so far, and its length in bytes
        self._length = 0

    @cached_property
    def _packs(self) -> Packs:
        self.reread()  # another process may have committed rounds
        return Packs(self.folder / "personal", self._last, self._checkpoint.get("packs"))

    @cached_property
    def _checkpoint(self) -> dict[str, Any]:
        """The content of ``checkpoint.json``; empty before it is written."""
        path = self.folder / CHECKPOINT
        return sealed.read(path) if path.exists() else {}

    # -- once per run

    def create(self, files: Mapping[str, str]) -> None:
        """Writes the files that describe the run, ``config.yaml`` last, because it marks a run."""
        known = {name: sealed.blake(text.encode()) for name, text in files.items()}
        self._checkpoint = {"round": None, "files": known}
        sealed.write(self.folder / CHECKPOINT, self._checkpoint, indent=None)
        for name, text in sorted(files.items(), key=lambda item: item[0] == CONFIG):
            write_text(self.folder / name, text)
        sync(self.folder.absolute().parent)

    def seal(self, name: str) -> None:
        """Adds the digest of a written file to the following checkpoints."""
        known = self._checkpoint.get("files", {}) | sealed.digests(self.folder, [name])
        self._checkpoint = {**self._checkpoint, "files": known}

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
        path = self.folder / CHECKPOINT
        return sealed.read(path)["round"] if path.exists() else None

    @property
    def _last(self) -> int:
        done = self.finished()
        return -1 if done is None else done

    def reread(self) -> None:
        """Forgets the checkpoint that was read before."""
        vars(self).pop("_checkpoint", None)

    def rewind(self) -> None:
        """Removes the files and lines that a killed process left of an unfinished round.

        Raises:
            FedVLMError: a file of a finished round is missing or damaged.
        """
        self.reread()
        sealed.check(self.folder, self._checkpoint.get("files", {}))
        last, content = self._last, self._committed()
        for path in self._states():
            if int(path.stem) > last:
                path.unlink()
        for path in self._leftovers():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        kept = self._checkpoint.get(BEFORE, {}).get("packs", ())
        known = self._checkpoint.get("packs")
        self._packs = Packs.rewound(self.folder / "personal", last, known, kept)
        write_bytes(self.folder / METRICS, content)
        timing = [line for line in self.timing() if line["round"] <= last]
        write_text(self.folder / TIMING, "".join(json.dumps(line) + "\n" for line in timing))
        self._metrics, self._length = sealed.hashing(content), len(content)

    def _leftovers(self) -> list[Path]:
        """The half-written files and folders of a killed process, at the run's own places."""
        own = [self.folder / f"{mark}{name}.tmp" for name in FILES for mark in ("", ".")]
        inside = (self.folder / name for name in _WRITTEN)
        found = (path for folder in inside for path in folder.glob("*"))
        return [*filter(Path.exists, own), *filter(_unfinished, found)]

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
        """The server's state after the last finished round.

        Raises:
            FedVLMError: its file is missing or damaged.
        """
        from safetensors.torch import load

        path = self.folder / "server" / f"{self.finished():05d}.safetensors"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise sealed.unreadable(path, error) from error
        if sealed.blake(content) != self._checkpoint.get("server"):
            raise sealed.damaged(path)
        return load(content)

    def commit(
        self,
        round_: int,
        state: Tree,
        line: dict[str, Any],
        timing: dict[str, Any],
        ending: bool = False,
    ) -> None:
        """Finishes a round: writes its state and lines, then the checkpoint, then cleans up.

        Args:
            round_: the round.
            state: the server's state after it.
            line: its line of metrics.
            timing: its line of seconds.
            ending: whether the state before this round stays, because a run goes on from there.
        """
        fresh = self._packs.settle(round_)
        server = self.folder / "server" / f"{round_:05d}.safetensors"
        content = save_tree(server, state)
        if self._metrics is None:
            before = self._committed()
            self._metrics, self._length = sealed.hashing(before), len(before)
        added = append_line(self.folder / METRICS, line)
        append_line(self.folder / TIMING, timing)
        self._metrics.update(added)
        self._length += len(added)
        fresh += [server, server.parent, self.folder / METRICS, self.folder / TIMING]
        sync_all(fresh)
        base = {key: self._checkpoint[key] for key in STATE} if ending else {}
        self._checkpoint = {
            "round": round_,
            "files": self._checkpoint.get("files", {}),
            "server": sealed.blake(content),
            "metrics": {"bytes": self._length, "digest": self._metrics.hexdigest()},
            "packs": self._packs.names(),
            **{k: self._checkpoint[k] for k in (FINISHED, PLANNED) if k in self._checkpoint},
            **({BEFORE: base} if ending else {}),
        }
        sealed.write(self.folder / CHECKPOINT, self._checkpoint, indent=None)
        for old in self._states()[: -1 - ending]:
            old.unlink()
        self._packs.sweep(base.get("packs", ()))

    def _states(self) -> list[Path]:
        found = (self.folder / "server").glob("*.safetensors")
        return sorted((p for p in found if p.stem.isdecimal()), key=lambda p: int(p.stem))

    def _committed(self) -> bytes:
        """The lines of metrics up to the last finished round, as they stand in the file."""
        path, known = self.folder / METRICS, self._checkpoint.get("metrics")
        if known is None:
            return b""
        try:
            content = path.read_bytes()[: known["bytes"]]
        except OSError as error:
            raise sealed.unreadable(path, error) from error
        if len(content) < known["bytes"]:
            raise sealed.damaged(path, "its end is missing")
        if sealed.blake(content) != known["digest"]:
            raise sealed.damaged(path)
        return content

    def lines(self) -> list[dict[str, Any]]:
        """The metrics up to the last finished round, one dict per round.

        Raises:
            FedVLMError: the file is missing or damaged.
        """
        return [json.loads(line) for line in self._committed().splitlines()]

    def timing(self) -> list[dict[str, Any]]:
        """The seconds of the rounds; lines that cannot be read are left out."""
        found = []
        with contextlib.suppress(OSError):
            for text in (self.folder / TIMING).read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, RecursionError):
                    line = json.loads(text)
                    if isinstance(line, dict) and isinstance(line.get("round"), int):
                        found.append(line)
        return found


def check_whole(folder: str | Path) -> None:
    """Refuses a run with a damaged description, and a run of version 0.1.

    Raises:
        FedVLMError: ``checkpoint.json``, or a file that was written before the first round, is
            missing or damaged; or version 0.1 made the run.
    """
    path = Path(folder)
    if is_run(path) or ((path / CHECKPOINT).exists() and not has_not_begun(path)):
        try:
            found = sealed.read(path / CHECKPOINT)
        except FedVLMError:
            check_version(path)
            raise
        known = found["files"]
        if CONFIG in found and sealed.digests(path, [CONFIG])[CONFIG] != known[CONFIG]:
            write_text(path / CONFIG, found[CONFIG])  # a process was killed just before this
        # Answers are not needed to open a run; they are checked when they are read.
        sealed.check(path, {n: d for n, d in known.items() if not n.startswith("answers/")})


def belongs(path: str | Path) -> Path | None:
    """The folder of the run that a path belongs to; None for any other path.

    A new folder in ``export`` belongs to nobody. Links are followed, and case is ignored. A folder
    with no file of a run but ``config.yaml`` may be a person's own, with the settings of runs.
    """
    where = Path(os.path.realpath(Path(os.path.expanduser(path))))
    for folder in where.parents:
        if any((folder / name).exists() for name in (CHECKPOINT, DONE, METRICS)):
            first, *rest = where.relative_to(folder).parts
            # What a person exports goes to a folder in `export`, not deeper.
            if first.casefold() in (*FILES, *FOLDERS) and (first != "export" or len(rest) != 1):
                return folder
    return None


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (Path(folder) / CONFIG).exists()


def is_done(folder: str | Path) -> bool:
    """Whether a folder holds a finished run, to which no rounds are being added."""
    return is_run(folder) and (Path(folder) / DONE).exists() and not goes_on(folder)


def has_not_begun(folder: str | Path) -> bool:
    """Whether a process was killed while it created a run here, before the run had begun."""
    path = Path(folder)
    names = {p.name.removesuffix(".tmp") for p in path.iterdir()} if path.is_dir() else set()
    if is_run(path) or CHECKPOINT not in names or not names <= set(FILES):
        return False
    try:
        return not (path / CHECKPOINT).exists() or sealed.read(path / CHECKPOINT)["round"] is None
    except FedVLMError:
        return False


def check_fresh(folder: str | Path) -> None:
    """Refuses an output folder that holds something.

    Raises:
        FedVLMError: it holds a run (the message has the command that continues it) or other files.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise FedVLMError(f"output: '{path}' is a file; choose a folder with output=DIR")
    if is_run(path):
        state, more = ("a finished", " train.rounds=N") if is_done(path) else ("an unfinished", "")
        hint = f"continue it with 'fedvlm run --resume {path}{more}', or "
        raise FedVLMError(
            f"output: '{path}' holds {state} run; {hint}choose another with output=DIR"
        )
    if has_not_begun(path):
        return
    if path.exists() and any(
        p.name not in (".lock", *AUDIT) and not _unfinished(p) for p in path.iterdir()
    ):
        raise FedVLMError(
            f"output: '{path}' is not empty and holds no run; choose another folder with output=DIR"
        )

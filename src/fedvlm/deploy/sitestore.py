"""The state of a run at a site: one version a round, written whole or not at all.

A version names the tensors that are personal. A tensor is personal if the algorithm keeps it and
does not send a tensor of this name in the same round. No later upload of the run may hold it.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedvlm.errors import FedVLMError
from fedvlm.store import files, sealed
from fedvlm.store import run as stores
from fedvlm.store.files import sync
from fedvlm.tree import Tree, digest

KEPT = 2  # versions of the personal state: the last two rounds
PARTS = ("upload", "mine", "end")
PERSONAL = "personal.json"  # the names of all tensors that were ever personal in the run


@contextmanager
def on_a_full_disk(round_: int) -> Iterator[None]:
    """Says what a full disk means for a round.

    Raises:
        FedVLMError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FedVLMError(
            f"the site's disk is full, and round {round_} is not kept there, but earlier rounds "
            "are. The site takes part again when its disk has room"
        ) from error


@dataclass(frozen=True)
class Version:
    """The result of a site's round, as stored on its disk.

    Attributes:
        round: the round.
        down: the digest of the server's download.
        loss: mean training loss.
        weight: the number of training examples.
        trees: ``upload``, ``mine`` (the personal state) and ``end`` (the model after training).
    """

    round: int
    down: str
    loss: float
    weight: float
    trees: Mapping[str, Tree]

    @property
    def personal(self) -> frozenset[str]:
        """The names of the tensors that the client keeps and does not send."""
        return frozenset(self.trees["mine"].keys() - self.trees["upload"].keys())


class SiteStore(stores.Store):
    """The personal state of one client, one version a round; the last two versions are kept.

    Attributes:
        before: training begins with the newest version before this round; None: with the newest.
        fresh: the new personal state of the current round, until it is saved.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        self.before: int | None = None
        self.fresh: Tree = {}

    def rounds(self) -> list[int]:
        """The rounds with a stored version, the newest last."""
        names = (path.name for path in (self.folder / "rounds").glob("*"))
        return sorted(int(name) for name in names if name.isdigit())  # .tmp: unfinished

    def version(self, round_: int) -> Version | None:
        """The stored version of a round; None if there is none.

        Raises:
            FedVLMError: its files are damaged.
        """
        folder = self._of(round_)
        if not folder.exists():
            return None
        try:
            about = sealed.read(folder / "reply.json")
            trees = {name: files.load_tree(folder / f"{name}.safetensors") for name in PARTS}
            whole = {name: digest(tree) for name, tree in trees.items()} == about["digests"]
            version = Version(round_, about["down"], about["loss"], about["weight"], trees)
            whole = whole and sorted(version.personal) == about["personal"]
        except Exception as error:
            raise self._damaged(round_) from error
        if not whole:
            raise self._damaged(round_)
        return version

    def personal_names(self) -> frozenset[str]:
        """The names of all tensors that were ever personal in this run.

        Raises:
            FedVLMError: the file with these names is damaged, or missing beside a version.
        """
        path = self.folder / PERSONAL
        if not path.exists() and not self.rounds():
            return frozenset()
        return frozenset(sealed.read(path)["names"])

    def save(self, version: Version) -> None:
        """Adds a version, whole or not at all, and keeps the version before it; drops older ones.

        Raises:
            FedVLMError: the disk is full.
        """
        for scratch in (self.folder / "rounds").glob("*.tmp"):  # a killed process left it
            shutil.rmtree(scratch, ignore_errors=True)
        known = self.personal_names()
        scratch = self._of(version.round).with_suffix(".tmp")
        try:
            with on_a_full_disk(version.round):
                if not known or version.personal - known:
                    names = sorted(known | version.personal)
                    sealed.write(self.folder / PERSONAL, {"names": names})
                self._write(version, scratch)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _write(self, version: Version, scratch: Path) -> None:
        folder = self._of(version.round)
        for name, tree in version.trees.items():
            files.save_tree(scratch / f"{name}.safetensors", tree)
        about = {
            "round": version.round,
            "down": version.down,
            "loss": version.loss,
            "weight": version.weight,
            "personal": sorted(version.personal),
            "digests": {name: digest(tree) for name, tree in version.trees.items()},
        }
        sealed.write(scratch / "reply.json", about)
        for path in scratch.iterdir():
            sync(path)
        if folder.exists():  # the round was done with another download
            shutil.rmtree(folder)
        scratch.rename(folder)
        sync(folder.parent)
        for old in self.rounds()[:-KEPT]:
            shutil.rmtree(self._of(old))

    def personal(self, clients: Sequence[str]) -> list[Tree]:
        known = [n for n in self.rounds() if self.before is None or n < self.before]
        found = self.version(known[-1]) if known else None
        return [dict(found.trees["mine"]) if found else {} for _ in clients]

    def keep(self, round_: int, position: int, kept: Mapping[str, Tree]) -> None:
        (self.fresh,) = kept.values()

    def _of(self, round_: int) -> Path:
        return self.folder / "rounds" / f"{round_:05d}"

    def _damaged(self, round_: int) -> FedVLMError:
        return FedVLMError(
            f"the personal state of round {round_} in '{self._of(round_)}' is damaged: restore it, "
            "or remove this folder to continue from the previous round"
        )

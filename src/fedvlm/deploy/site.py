"""One client's side of a run: its own rows, its own model, and its state on its own disk.

Every round is idempotent: a repeated request gets the saved reply. So a server that has lost a
reply may ask again. Layout of a run's folder at a site::

    rounds/00007/  upload, mine, end (.safetensors) and reply.json, written whole or not at all
    answers/  adapters/                             the answers of the site's models, and the models
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedvlm.algorithms.base import NOBODY, Visit
from fedvlm.data.fingerprint import content
from fedvlm.deploy.policy import Policy, Refused
from fedvlm.engines.base import Models, Scores
from fedvlm.engines.wire import Task
from fedvlm.errors import FedVLMError
from fedvlm.rounds import prepare as preparing
from fedvlm.rounds.results import write_answers
from fedvlm.rounds.schedule import standing
from fedvlm.settings.sections import Config
from fedvlm.store import files, sealed
from fedvlm.store import run as stores
from fedvlm.store.files import sync
from fedvlm.tree import Tree, digest, saved_bytes

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition

KEPT = 2  # versions of the personal state: the last two rounds
PARTS = ("upload", "mine", "end")


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
        except Exception as error:
            raise self._damaged(round_) from error
        if not whole:
            raise self._damaged(round_)
        return Version(round_, about["down"], about["loss"], about["weight"], trees)

    def save(self, version: Version) -> None:
        """Adds a version, whole or not at all, and keeps the version before it; drops older ones.

        Raises:
            FedVLMError: the disk is full.
        """
        for scratch in (self.folder / "rounds").glob("*.tmp"):  # a killed process left it
            shutil.rmtree(scratch, ignore_errors=True)
        scratch = self._of(version.round).with_suffix(".tmp")
        try:
            self._write(version, scratch)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FedVLMError(
                    f"the site's disk is full, and round {version.round} is not kept there, but "
                    "earlier rounds are. The site takes part again when its disk has room"
                ) from error
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


class Site:
    """One client of a run.

    Args:
        name: the name of the client.
        config: the run's settings, as the server sent them.
        data: path of the site's rows.
        folder: the folder of this run at this site, locked.
        policy: the site's policy.

    Raises:
        Refused: the policy does not allow the run.
        FedVLMError: data or model cannot be used.
    """

    def __init__(self, name: str, config: Config, data: str, folder: Path, policy: Policy):
        policy.check(config)
        self.name, self.policy, self.folder = name, policy, folder
        self.config = policy.localized(config, data, folder)
        self.store = SiteStore(folder)
        self.engine, own, _ = preparing.prepare(self.config, None, self._divided, self.store)
        self._check_rows(self.engine.collator.rows)
        self.rows = own.counts()[name]
        self.algorithm = self.engine.algorithm

    def _divided(self, config: Config, rows: Any) -> Partition:
        """The partition of the site's rows, which has one client."""
        whole = preparing.partitioned(config, rows)
        (split,), (skew,) = whole.splits.values(), whole.skew.values()
        name = self.name
        return replace(whole, clients=(name,), splits={name: split}, skew={name: skew})

    def _check_rows(self, rows: Any) -> None:
        """Refuses rows other than those of the site's first part in this run."""
        known = {"columns": content(rows, (self.config.eval.group_by,))}
        path = self.folder / "data.json"
        if not path.exists():
            sealed.write(path, known)
        elif sealed.read(path) != known:
            raise FedVLMError(
                f"the rows of site '{self.name}' are not what they were when its part in this run "
                f"began; restore them, or remove '{self.folder}' to begin with the new rows"
            )

    def described(self) -> dict[str, Any]:
        """The facts about this site that the server needs."""
        about: dict[str, Any] = {"adapter": digest(self.engine.adapter)}
        return about | ({"rows": self.rows} if self.policy.tell_rows else {})

    def train(self, round_: int, down: Tree, sampled: float = 1.0) -> Version:
        """Runs a round; a repeated request returns the saved result.

        Args:
            round_: from 1.
            down: the download from the server.
            sampled: the cohort's share of all clients' examples, according to the server.

        Raises:
            Refused: the message is too large, or the round is over.
            FedVLMError: training failed, or the state cannot be read or written.
        """
        if round_ < 1:
            raise Refused(f"training begins with round 1, got {round_}")
        self.store.before = None
        self._arrived(down)
        sent, rounds = digest(down), self.store.rounds()
        saved = self.store.version(round_) if round_ in rounds else None
        if saved and saved.down == sent:
            self.engine.ended[self.name] = dict(saved.trees["end"])
            return saved
        if rounds and round_ < rounds[-1]:
            raise Refused(
                f"round {round_} is over: this site has done round {rounds[-1]}, and cannot repeat "
                "an earlier round with another download"
            )
        self.store.before = round_
        try:
            task = Task(self._visit(round_, sampled), down, rated=True)
            (reply,) = self.engine.train([task])
        finally:
            self.store.before = None
        end = self.engine.ended[self.name]
        self.policy.check_bytes(saved_bytes(reply.upload), "up")
        trees = {"upload": reply.upload, "mine": self.store.fresh, "end": end}
        version = Version(round_, sent, reply.loss, reply.weight, trees)
        self.store.save(version)
        return version

    def score(self, kind: Literal["global", "personal", "end"], round_: int, down: Tree) -> Scores:
        """Scores of one of the client's models on its held-out rows."""
        scores = self.engine.score(self._models(kind, round_, down))[self.name]
        if not self.policy.tell_rows:
            scores.pop("examples", None)
        return scores

    def answer(
        self, name: str, kind: Literal["global", "personal"], round_: int, down: Tree
    ) -> None:
        """Writes a model's answers to the held-out rows; they stay at the site."""
        found = self.engine.answer(name, self._models(kind, round_, down))
        write_answers(self.folder, name, found)

    def export(
        self, name: str, kind: Literal["global", "personal"], round_: int, down: Tree
    ) -> None:
        """Writes a model as a PEFT folder at the site."""
        folder = self.folder / "adapters" / name
        self.engine.export(self._models(kind, round_, down), {self.name: folder})

    def adapter_files(self) -> tuple[dict[str, Any], Tree]:
        """PEFT's settings and the factors of the initial adapter, a function of model and seed."""
        from fedvlm.models.lora import save_adapter

        folder = self.folder / "adapters" / "initial"
        save_adapter(self.engine.model, self.engine.adapter, folder)
        about = json.loads((folder / "adapter_config.json").read_text())
        about["base_model_name_or_path"] = None  # would reveal a path of this site
        return about, self.engine.adapter

    def _models(self, kind: Any, round_: int, down: Tree) -> Models:
        if kind == "end":
            saved = self.store.version(round_)
            if self.name not in self.engine.ended and saved:
                self.engine.ended[self.name] = dict(saved.trees["end"])
        else:
            self._arrived(down)
            nobody = replace(self._visit(round_), client=NOBODY.client)
            asked = nobody if kind == "global" else self._visit(round_)
            self.engine.forms.check_download(asked, down, self.name)
        return Models(kind, [(self._visit(round_), down)])

    def _arrived(self, down: Tree) -> None:
        """Checks the size of every download; the engine checks its form when it trains.

        Raises:
            Refused: the download is too large.
        """
        self.policy.check_bytes(saved_bytes(down), "down")

    def _visit(self, round_: int, sampled: float = 1.0) -> Visit:
        """This client in a round. The site's settings determine the final round.

        Raises:
            Refused: the round or the share is impossible.
        """
        last = self.config.train.rounds + self.algorithm.final
        if not 0 <= round_ <= last:
            raise Refused(f"there is no round {round_}: this run has {last} rounds")
        if not 0 < sampled <= 1:
            raise Refused(
                f"a cohort's share of all examples must be in (0, 1], got {sampled!r:.40}"
            )
        return standing(self.config, self.algorithm, round_).visit(
            self.name, float(self.rows["train"]), sampled
        )

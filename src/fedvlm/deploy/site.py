"""One client's side of a run: its own rows, its own model, and its state on its own disk.

Everything is idempotent: a round that was answered is answered again with the saved reply, so that
a server which has lost it may ask anew. Layout of a run's folder at a site::

    rounds/00007/  upload, mine, end (.safetensors) and reply.json, written whole or not at all
    answers/  adapters/                             what the site's models say, and the models
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedvlm.algorithms.base import NOBODY, Visit
from fedvlm.deploy.policy import Policy, Refused
from fedvlm.engines.base import Models, Scores
from fedvlm.engines.wire import Task
from fedvlm.errors import FedVLMError
from fedvlm.rounds import prepare as preparing
from fedvlm.rounds.results import write_answers
from fedvlm.rounds.schedule import standing
from fedvlm.settings.sections import Config
from fedvlm.store import files
from fedvlm.store import run as stores
from fedvlm.store.files import sync
from fedvlm.tree import Tree, digest, saved_bytes

KEPT = 2  # versions of the personal state: the last one and the one before
PARTS = ("upload", "mine", "end")


@dataclass(frozen=True)
class Version:
    """What a site did in a round, as it is on its disk.

    Attributes:
        round: the round.
        down: the digest of what the server had sent.
        loss: mean training loss.
        weight: the number of training examples.
        trees: ``upload``, ``mine`` (what is personal) and ``end`` (the model after training).
    """

    round: int
    down: str
    loss: float
    weight: float
    trees: Mapping[str, Tree]


class SiteStore(stores.Store):
    """The personal state of one client, a version a round; the last two are kept.

    Attributes:
        before: training begins with what was kept before this round; None: with the newest.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        self.before: int | None = None
        self.fresh: Tree = {}  # what the round under way leaves, until it is saved

    def rounds(self) -> list[int]:
        """The rounds of which there is a version, the newest one last."""
        names = (path.name for path in (self.folder / "rounds").glob("*"))
        return sorted(int(name) for name in names if name.isdigit())  # .tmp: was not finished

    def version(self, round_: int) -> Version | None:
        """What was done in a round, None if that is not here.

        Raises:
            FedVLMError: its files are not what was written.
        """
        folder = self._of(round_)
        if not folder.exists():
            return None
        try:
            about = json.loads((folder / "reply.json").read_text())
            trees = {name: files.load_tree(folder / f"{name}.safetensors") for name in PARTS}
            whole = {name: digest(tree) for name, tree in trees.items()} == about["digests"]
        except Exception as error:
            raise self._damaged(round_) from error
        if not whole:
            raise self._damaged(round_)
        return Version(round_, about["down"], about["loss"], about["weight"], trees)

    def save(self, version: Version) -> None:
        """Adds a version, whole or not at all, and drops those before the one before it.

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
                    f"the site's disk is full, and round {version.round} is not kept there; what "
                    "was finished before is. The site takes part again when it has room"
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
        files.write_text(scratch / "reply.json", json.dumps(about, indent=2) + "\n")
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
            "or remove that folder to go on from the round before"
        )


class Site:
    """One client of a run.

    Args:
        name: the client's.
        config: the run's settings, as the server sent them.
        data: the site's rows.
        folder: of this run at this site, locked.
        policy: what the site allows.

    Raises:
        Refused: the policy does not allow the run.
        FedVLMError: data or model cannot be used.
    """

    def __init__(self, name: str, config: Config, data: str, folder: Path, policy: Policy):
        policy.check(config)
        self.name, self.policy, self.folder = name, policy, folder
        self.config = policy.localized(config, data, folder)
        self.store = SiteStore(folder)
        rows, whole = preparing.divide(self.config)
        (split,), (skew,) = whole.splits.values(), whole.skew.values()
        own = replace(whole, clients=(name,), splits={name: split}, skew={name: skew})
        self.engine, _, _ = preparing.prepare(self.config, None, (rows, own), self.store)
        self.rows = own.counts()[name]
        self.algorithm = self.engine.algorithm

    def described(self) -> dict[str, Any]:
        """What the server has to know of this site."""
        about: dict[str, Any] = {"adapter": digest(self.engine.adapter)}
        return about | ({"rows": self.rows} if self.policy.tell_rows else {})

    def train(self, round_: int, down: Tree, sampled: float = 1.0) -> Version:
        """Runs a round, or gives the reply that was saved when it was run before.

        Args:
            round_: from 1.
            down: what the server sent.
            sampled: the cohort's share of all clients' examples, as the server states it.

        Raises:
            Refused: the message is too large, or the round is long over.
            FedVLMError: training failed, or the state cannot be read or written.
        """
        self.store.before = None
        self._arrived(down)
        sent, rounds = digest(down), self.store.rounds()
        saved = self.store.version(round_) if round_ in rounds else None
        if saved and saved.down == sent:
            self.engine.ended[self.name] = dict(saved.trees["end"])
            return saved
        if rounds and round_ < rounds[-1]:
            raise Refused(
                f"round {round_} is over: this site has done round {rounds[-1]}, and its reply to "
                "another download cannot be given"
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
        """Writes a model's answers to the held-out rows, which stay here."""
        found = self.engine.answer(name, self._models(kind, round_, down))
        write_answers(self.folder, name, found)

    def export(
        self, name: str, kind: Literal["global", "personal"], round_: int, down: Tree
    ) -> None:
        """Writes a model as a PEFT folder, here."""
        folder = self.folder / "adapters" / name
        self.engine.export(self._models(kind, round_, down), {self.name: folder})

    def adapter_files(self) -> tuple[dict[str, Any], Tree]:
        """The initial adapter, a function of model and seed: PEFT's settings, and the factors."""
        from fedvlm.models.lora import save_adapter

        folder = self.folder / "adapters" / "initial"
        save_adapter(self.engine.model, self.engine.adapter, folder)
        about = json.loads((folder / "adapter_config.json").read_text())
        about["base_model_name_or_path"] = None  # a path of this site's
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
        """The one place where a download comes in; the engine checks its form when it trains.

        Raises:
            Refused: it is not accepted.
        """
        self.policy.check_bytes(saved_bytes(down), "down")

    def _visit(self, round_: int, sampled: float = 1.0) -> Visit:
        """This client in a round. The final round follows from the site's own settings.

        Raises:
            Refused: there is no such round, or no such share.
        """
        last = self.config.train.rounds + self.algorithm.final
        if not 0 <= round_ <= last:
            raise Refused(f"round {round_} is none of this run, which has {last}")
        if not 0 < sampled <= 1:
            raise Refused(f"a cohort's share of all examples is in (0, 1], got {sampled!r:.40}")
        return standing(self.config, self.algorithm, round_).visit(
            self.name, float(self.rows["train"]), sampled
        )

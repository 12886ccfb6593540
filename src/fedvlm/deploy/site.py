"""One client's side of a run: its own rows, its own model, and its state on its own disk.

Every round is idempotent: a repeated request gets the saved reply. So a server that has lost a
reply may ask again. Layout of a run's folder at a site::

    run.json  asked.json  personal.json  data.json  the ledger, personal names, digests of the rows
    rounds/00007/  upload, mine, end (.safetensors) and reply.json, written whole or not at all
    answers/  adapters/                             the answers of the site's models, and the models
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedvlm.algorithms.base import NOBODY, Visit
from fedvlm.data.fingerprint import content
from fedvlm.deploy import limits
from fedvlm.deploy.account import Account
from fedvlm.deploy.ledger import Ledger
from fedvlm.deploy.policy import Policy, Refused
from fedvlm.deploy.sitestore import SiteStore, Version, on_a_full_disk
from fedvlm.engines.base import Models, Scores
from fedvlm.engines.wire import Task
from fedvlm.errors import FedVLMError, counted
from fedvlm.metrics import average
from fedvlm.privacy.plan import Unplanned
from fedvlm.rounds import prepare as preparing
from fedvlm.rounds.budget import work
from fedvlm.rounds.results import write_answers
from fedvlm.rounds.schedule import plan, standing
from fedvlm.settings.sections import Config
from fedvlm.store import sealed
from fedvlm.tree import Tree, digest, saved_bytes

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition

logger = logging.getLogger("fedvlm")


class Site:
    """One client of a run.

    Args:
        name: the name of the client.
        config: the run's settings, as the server sent them.
        data: path of the site's rows.
        folder: the folder of this run at this site, locked.
        policy: the site's policy.
        state: the folder of the site's state, with the ledger of differential privacy over all
            runs; None: two folders above the run's.

    Attributes:
        private: whether the run is under differential privacy. Then no number that depends on the
            rows leaves the site, except for the factors that are trained with noise.

    Raises:
        Refused: the policy does not allow the run, or the rows have too little privacy left.
        FedVLMError: data or model cannot be used.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        data: str,
        folder: Path,
        policy: Policy,
        state: Path | None = None,
    ):
        policy.check(config)
        self.ledger = Ledger(folder)
        self.ledger.begin(folder.name, config)
        self.name, self.policy, self.folder = name, policy, folder
        self.config = policy.localized(config, data, folder)
        self.private = self.config.privacy.local
        self.store = SiteStore(folder)
        self.engine, own, _ = self._prepared()
        self.engine.score_step = policy.score_step
        self._check_rows(self.engine.collator.rows)
        self.rows = own.counts()[name]
        self.algorithm = self.engine.algorithm
        self.account = self._opened_account(state or folder.parents[1]) if self.private else None

    def _prepared(self) -> Any:
        """Rows, model and engine of the run. No message to the server has a number of units."""
        try:
            return preparing.prepare(self.config, None, self._divided, self.store)
        except Unplanned as error:
            logger.error("%s", error)
            raise Refused(
                "the site cannot plan this run with its number of protected units: there are too "
                "few for any plan, or for privacy.delta, which must be below 1 / their number; "
                "the site's log has the number"
            ) from None

    def _opened_account(self, state: Path) -> Account:
        """The account of the run, which is in the ledger from now on."""
        rounds = list(plan(self.config, self.algorithm, (self.name,)))
        steps, _ = work(self.config, self.algorithm, self.engine.adapter, rounds)
        by_round = {r.number: count for r, count in zip(rounds, steps, strict=True)}
        made = self.engine.plans[self.name]
        account = Account(state, self.folder.name, made, by_round, self.policy)
        chosen = self.engine.partition.splits[self.name].train
        account.open(self.config.privacy, self.engine.collator.rows, chosen)
        return account

    def _divided(self, config: Config, rows: Any) -> Partition:
        """The partition of the site's rows that the run may use, which has one client."""
        whole = preparing.partitioned(config, rows)
        (split,), (skew,) = whole.splits.values(), whole.skew.values()
        name = self.name
        counts = {part: len(getattr(split, part)) for part in ("train", "val", "test")}
        logger.info("rows of site '%s': %s", name, counts)
        split = limits.admitted(self.policy, config, split)
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
        told = self.policy.tell_rows and not self.private
        return about | ({"rows": self.rows} if told else {})

    def train(self, round_: int, down: Tree, sampled: float = 1.0) -> Version:
        """Runs a round; a repeated request returns the saved result.

        Args:
            round_: from 1.
            down: the download from the server.
            sampled: the cohort's share of all clients' examples, according to the server.

        Raises:
            Refused: there is no such round, it is over or was repeated too often; a message or the
                run's folder is too large; the upload holds a personal tensor; the round would
                spend more privacy than is left.
            FedVLMError: training failed, or the state cannot be read or written.
        """
        if round_ < 1:
            raise Refused(f"training begins with round 1, got {round_}")
        visit = self._visit(round_, sampled)
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
        with on_a_full_disk(round_):
            self.ledger.training(round_, sent, rounds[-1] if rounds else 0)
            if self.account:
                self.account.spend(round_, sent)
        self.store.before = round_
        try:
            task = Task(visit, down, rated=True)
            (reply,) = self.engine.train([task])
        finally:
            self.store.before = None
        if self.account:
            self.account.check_trained(round_, reply.steps)
        end = self.engine.ended[self.name]
        self._check_upload(reply.upload)
        trees = {"upload": reply.upload, "mine": self.store.fresh, "end": end}
        version = Version(round_, sent, reply.loss, reply.weight, trees)
        limits.check_disk(self.policy, self.folder, sum(map(saved_bytes, trees.values())))
        self.store.save(version)
        return version

    def _check_upload(self, upload: Tree) -> None:
        """Refuses an upload that is too large, or that holds a tensor that was ever personal."""
        limits.check_bytes(self.policy, saved_bytes(upload), "up")
        personal = sorted(upload.keys() & self.store.personal_names())
        if personal:
            raise Refused(
                f"the upload would hold '{personal[0]}' and {len(personal) - 1} more tensors that "
                "are personal in this run; they never leave the site"
            )

    def score(self, kind: Literal["global", "personal", "end"], round_: int, down: Tree) -> Scores:
        """Scores of one of the client's models on its held-out rows, rounded.

        Each model of a round is scored once. The same question gets the same answer again.

        Raises:
            Refused: the question is another one than before, or one too many; or the run is under
                differential privacy.
        """
        if self.private:
            raise Refused(
                "no score leaves a site under differential privacy (privacy.unit): a mean over "
                "held-out rows has no noise and no accounting"
            )
        models = self._models(kind, round_, down)
        sent = self._trained(round_).down if kind == "end" else digest(down)
        saved = self.ledger.scoring(kind, round_, sent, self.policy.scores)
        if saved:
            return saved
        scores = limits.told(self.policy, self.engine.score(models)[self.name])
        self.ledger.scored(kind, round_, sent, scores)
        return scores

    def answer(
        self, name: str, kind: Literal["global", "personal"], round_: int, down: Tree
    ) -> None:
        """Writes a model's answers to the held-out rows; they stay at the site."""
        limits.check_disk(self.policy, self.folder)
        found = self.engine.answer(name, self._models(kind, round_, down))
        write_answers(self.folder, name, found)
        if self.private:  # the server, which prints the scores of other runs, gets none
            logger.info("the %s model on held-out rows: %s", name, average(found[self.name]))

    def export(
        self, name: str, kind: Literal["global", "personal"], round_: int, down: Tree
    ) -> None:
        """Writes a model as a PEFT folder at the site."""
        limits.check_disk(self.policy, self.folder)
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
            self.engine.ended[self.name] = dict(self._trained(round_).trees["end"])
        else:
            self._arrived(down)
            nobody = replace(self._visit(round_), client=NOBODY.client)
            asked = nobody if kind == "global" else self._visit(round_)
            self.engine.forms.check_download(asked, down, self.name)
        return Models(kind, [(self._visit(round_), down)])

    def _trained(self, round_: int) -> Version:
        """The stored result of a round.

        Raises:
            Refused: there is none.
        """
        found = self.store.version(round_) if round_ in self.store.rounds() else None
        if found is None:
            raise Refused(f"this site has no result of round {round_}, of which a model is asked")
        return found

    def _arrived(self, down: Tree) -> None:
        """Checks the size of every download; the engine checks its form when it trains.

        Raises:
            Refused: the download is too large.
        """
        limits.check_bytes(self.policy, saved_bytes(down), "down")

    def _visit(self, round_: int, sampled: float = 1.0) -> Visit:
        """This client in a round. The site's settings determine the final round.

        Raises:
            Refused: the round or the share is impossible.
        """
        last = self.config.train.rounds + self.algorithm.final
        if not 0 <= round_ <= last:
            raise Refused(f"there is no round {round_}: this run has {counted(last, 'round')}")
        if not 0 < sampled <= 1:
            raise Refused(
                f"a cohort's share of all examples must be in (0, 1], got {sampled!r:.40}"
            )
        return standing(self.config, self.algorithm, round_).visit(
            self.name, 1.0 if self.private else float(self.rows["train"]), sampled
        )

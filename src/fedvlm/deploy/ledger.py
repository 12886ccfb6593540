"""A run's ledger at a site: what the server has asked, kept on disk before the site answers.

A server may forget, lie, or open the run in another process. The ledger does not depend on it::

    run.json     the number of the run and its configuration, at the first open
    asked.json   the scorings with their answers, and the downloads of the newest rounds
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fedvlm import config as configs
from fedvlm.deploy.limits import Refused, digest_of, used
from fedvlm.engines.base import Scores
from fedvlm.errors import ConfigError
from fedvlm.settings.sections import Config
from fedvlm.store import sealed
from fedvlm.version import __version__, minor

logger = logging.getLogger("fedvlm")

TRIES = 3
"""Number of different downloads with which a round may be trained. An honest server repeats a round
with another download when it was killed in the round, and other sites answered afterwards."""


class Ledger:
    """The ledger in the folder of a run, which is locked.

    Args:
        folder: the folder of the run at the site.

    Raises:
        FedVLMError: its files are damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._asked: dict[str, Any] = {"scorings": 0, "answers": {}, "trained": {}}
        if (folder / "asked.json").exists():
            self._asked = sealed.read(folder / "asked.json")

    def begin(self, run: str, config: Config) -> None:
        """Notes the configuration of a run at its first open, and refuses any other later.

        Args:
            run: the number of the run.
            config: its configuration.

        Raises:
            Refused: the run began with other settings, or its folder holds the state of another.
        """
        path, now = self.folder / "run.json", digest_of(config)
        if self.folder.is_symlink():
            raise Refused(f"the folder of run '{run}' at this site is a link to another folder")
        if not path.exists():
            if (self.folder / "rounds").exists():
                raise Refused(
                    f"the folder of run '{run}' at this site holds state, but not the settings "
                    "that made it: start a new run"
                )
            about = {"run": run, "config": now, "settings": used(config), "fedvlm": __version__}
            sealed.write(path, about)
            return
        known = sealed.read(path)
        if known["run"] != run:
            raise Refused(f"the folder of run '{run}' at this site holds the state of another run")
        if known["config"] != now and not _read_again(run, known, now):
            raise Refused(
                f"run '{run}' began at this site with other settings (their digest is "
                f"{known['config'][:16]}, and now {now[:16]}): a run keeps its settings; start "
                "a new run"
            )

    def training(self, round_: int, down: str, newest: int) -> None:
        """Notes that a round is about to be trained.

        Args:
            round_: the round.
            down: the digest of the download.
            newest: the newest round with a stored result, 0 without any.

        Raises:
            Refused: the round was trained with too many other downloads.
        """
        trained = {n: d for n, d in self._asked["trained"].items() if int(n) >= newest}
        downs = trained.setdefault(str(round_), [])
        if down in downs:
            return
        if len(downs) >= TRIES:
            raise Refused(
                f"round {round_} was trained with {TRIES} different downloads at this site, and "
                "cannot be trained with another one"
            )
        downs.append(down)
        answers = self._asked["answers"]
        kept = {key: a for key, a in answers.items() if not key.endswith(f"/{round_}")}
        self._write({**self._asked, "trained": trained, "answers": kept})

    def scoring(self, kind: str, round_: int, down: str, most: int) -> Scores | None:
        """The saved answer to a question, or None for a new question, which is counted.

        Args:
            kind: which of the client's models.
            round_: the round.
            down: the digest of the download.
            most: largest number of scorings.

        Raises:
            Refused: there is another question of this kind and round, or there are too many.
        """
        found = self._asked["answers"].get(f"{kind}/{round_}")
        if found and found["down"] == down:
            return found["scores"]
        if found:
            raise Refused(
                f"the {kind} model of round {round_} was scored with another download; a site "
                "scores each model of a round once"
            )
        count = self._asked["scorings"]
        if count >= most:
            raise Refused(
                f"the site has answered {count} scorings of this run, and the limit is {most} "
                "(scores): evaluate less often (eval.every), or ask the site to raise its limit"
            )
        self._answer(kind, round_, {"down": down, "scores": None}, count + 1)
        return None

    def scored(self, kind: str, round_: int, down: str, scores: Scores) -> None:
        """Saves an answer before it leaves the site."""
        self._answer(kind, round_, {"down": down, "scores": scores}, self._asked["scorings"])

    def _answer(self, kind: str, round_: int, answer: dict[str, Any], count: int) -> None:
        answers = {**self._asked["answers"], f"{kind}/{round_}": answer}
        self._write({**self._asked, "answers": answers, "scorings": count})

    def _write(self, asked: dict[str, Any]) -> None:
        """Writes the file first: a full disk or a crash gives no free question."""
        sealed.write(self.folder / "asked.json", asked)
        self._asked = asked


def _read_again(run: str, known: dict[str, Any], now: str) -> bool:
    """Whether the settings that a run began with are the present ones, as this version reads them.

    Another version had other settings: those that came later have their default now.

    Args:
        run: the number of the run.
        known: the content of ``run.json``.
        now: the digest of the present settings.

    Raises:
        Refused: this version cannot read them. The message does not tell the site's version.
    """
    began = known.get("fedvlm")
    if "settings" not in known:
        return False
    try:
        return digest_of(configs.load(known["settings"])) == now
    except ConfigError as error:
        logger.error("run %s began under fedvlm %s: %s", run, began, error)
        raise Refused(
            f"run '{run}' began at this site under fedvlm {minor(began)}, whose settings the "
            "present version cannot read: finish it with that version, or start a new run"
        ) from None

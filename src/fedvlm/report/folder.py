"""The folder of a run, finished or not, or of a comparison, read for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm.after.audit import FILE as AUDIT
from fedvlm.after.audit import Audit
from fedvlm.after.names import no_run
from fedvlm.after.opened import Opened
from fedvlm.engines.base import Answer
from fedvlm.errors import FedVLMError
from fedvlm.rounds.comparison import Comparison
from fedvlm.rounds.pictures import COMPARISON, NEITHER, runs_of, settings_of
from fedvlm.rounds.results import BUDGET, scored_model
from fedvlm.settings.sections import Config
from fedvlm.store import run as stores
from fedvlm.store import sealed
from fedvlm.store.files import read_lines

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition

SHOWN = ("untuned", "global", "personal")
"""The models that the report shows."""


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        folder: its folder.
        config: its settings.
        lines: its metrics, one line a round.
        timing: seconds and memory of its rounds.
        opened: the finished run; None for an unfinished one.
        deployed: whether the clients were sites on other machines.
        models: model -> its scores, as in ``table.json``. It is empty where no site told a score.
        answers: model -> its answers to the held-out rows, as far as their files are whole.
        partition: the rows of the clients; None for a deployed run.
        privacy: the content of ``privacy.json``; None without it.
        audit: the audit of the run; None without one.
        missing: the reasons why something cannot be shown.
    """

    folder: Path
    config: Config
    lines: Sequence[Mapping[str, Any]]
    timing: Sequence[Mapping[str, Any]]
    opened: Opened | None
    deployed: bool
    models: Mapping[str, Mapping[str, Any]]
    answers: Mapping[str, Sequence[Answer]]
    partition: Partition | None
    privacy: Mapping[str, Any] | None
    audit: Audit | None
    missing: Sequence[str] = field(default_factory=tuple)

    @property
    def sites(self) -> tuple[str, ...]:
        """The scored clients, in order."""
        return tuple(self.models["personal"]["clients"]) if self.models else ()

    @property
    def clients(self) -> tuple[str, ...]:
        """All clients whose names are known."""
        if self.partition is not None:
            return self.partition.clients
        asked = (client for line in self.lines for client in line.get("cohort", ()))
        return tuple(dict.fromkeys((*self.sites, *asked)))

    @property
    def metric(self) -> str:
        """The main metric."""
        return self.config.metric

    @property
    def round(self) -> int:
        """The last finished round; the ending counts as one."""
        return int(self.lines[-1]["round"]) if self.lines else 0


@dataclass(frozen=True)
class Compared:
    """A comparison.

    Attributes:
        folder: its folder.
        rows: one dict an algorithm, see :class:`~fedvlm.rounds.comparison.Comparison`.
        verdicts: one dict a site.
        runs: algorithm -> its runs, one a seed.
    """

    folder: Path
    rows: Sequence[Mapping[str, Any]]
    verdicts: Sequence[Mapping[str, Any]]
    runs: Mapping[str, Sequence[Run]]

    @property
    def first(self) -> Run:
        """The first run of the best algorithm that has one."""
        return next(found[0] for found in self.runs.values() if found)


def read(folder: str | Path) -> Run | Compared:
    """Reads the folder of a run or of a comparison.

    Raises:
        FedVLMError: the folder holds neither; or a file that the report needs is damaged.
    """
    path = Path(folder)
    if stores.is_run(path):
        return read_run(path)
    if not (path / COMPARISON).exists():
        raise FedVLMError(no_run(path) if not path.is_dir() else NEITHER.format(path))
    found = Comparison.read(path)
    names = runs_of(path, [str(row["algorithm"]) for row in found.rows])
    runs = {name: [read_run(run) for run in own] for name, own in names.items()}
    return Compared(path, found.rows, found.verdicts, runs)


def read_run(folder: Path) -> Run:
    """Reads the folder of a run.

    Raises:
        FedVLMError: a file of it is damaged.
    """
    stores.check_whole(folder)
    config, store = settings_of(folder), stores.Store(folder)
    lines = store.lines()
    opened = Opened(folder, config, None) if stores.is_done(folder) else None
    missing: list[str] = []
    answers = _answers(folder, opened, missing)
    from fedvlm.data.partition import Partition

    partition = Partition.read(folder)
    about, audit = None, None
    if (folder / BUDGET).exists():
        about = json.loads((folder / BUDGET).read_bytes())
    if (folder / AUDIT).exists():
        audit = _tried(lambda: Audit.read(folder), missing)
    models = _models(config, opened, lines, answers)
    return Run(
        folder,
        config,
        lines,
        store.timing(),
        opened,
        partition is None,
        models,
        answers,
        partition,
        about,
        audit,
        missing,
    )


def _tried(work: Any, missing: list[str]) -> Any:
    """What ``work`` returns; None after an error, whose reason joins ``missing``."""
    try:
        return work()
    except (FedVLMError, ValueError, TypeError, KeyError) as error:
        missing.append(str(error))
    return None


def _answers(
    folder: Path, opened: Opened | None, missing: list[str]
) -> dict[str, Sequence[Answer]]:
    """The answers of the models; files that are damaged or gone are left out."""
    found: dict[str, Sequence[Answer]] = {}
    for model in SHOWN:
        name = f"answers/{model}.jsonl"
        if opened and name in opened.results.files:
            lines = _tried(lambda model=model: opened.results.answers(model), missing)
        elif not opened and (folder / name).exists():
            lines = _tried(lambda name=name: read_lines(folder / name), missing)
        else:
            continue
        if lines:
            found[model] = lines
    return found


def _models(
    config: Config,
    opened: Opened | None,
    lines: Sequence[Mapping[str, Any]],
    answers: Mapping[str, Sequence[Answer]],
) -> dict[str, Mapping[str, Any]]:
    """The scores of the models at the end, or at the last evaluation of an unfinished run."""
    if opened:
        return {m: opened.results.table["models"][m] for m in SHOWN} if _told(opened) else {}
    rated = [line["evaluation"] for line in lines if (line["evaluation"] or {}).get("personal")]
    if not rated:
        return {}
    ends = {"untuned": rated[0]["personal"], **{m: rated[-1][m] for m in ("global", "personal")}}
    own = {m: answers.get(m, ()) if m == "untuned" else () for m in SHOWN}
    return {m: scored_model(ends[m], list(own[m])) for m in SHOWN}


def _told(opened: Opened) -> bool:
    return bool(opened.results.metrics)


def data_files(folder: Path) -> dict[str, Any]:
    """The digests of a run's rows, by column, and their number; empty in a deployed run."""
    path = folder / "data.json"
    return json.loads(path.read_bytes()) if path.exists() else {}


def environment(folder: Path) -> dict[str, Any]:
    """The versions and the machine of a run; empty without their file."""
    path = folder / "environment.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise sealed.damaged(path) from error
    return found if isinstance(found, dict) else {}

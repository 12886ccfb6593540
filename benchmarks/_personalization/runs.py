"""Runs of the personalization benchmark: their measurement, and the files that stay.

A measured run has a file `measured.json`, written last and atomically. A later start skips such a
run. After the measurement all files without further use are removed, so thousands of runs fit on a
disk.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import subprocess
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from _common import ROOT
from _personalization.cells import JOINED, JOINERS, SITES, Cell, merged, run_config, settings
from _personalization.ranks import rounds_to
from fedvlm.errors import FedVLMError
from fedvlm.metrics import summarize
from fedvlm.rounds import comparison
from fedvlm.rounds.results import Results
from fedvlm.settings.sections import Config
from fedvlm.store import files
from fedvlm.store import run as stores

MEASURED, FAILED, JOINS = "measured.json", "failed.txt", "joined.json"
MODELS = {  # name in the metrics lines -> values of the columns `model` and `when`
    "global_before": ("global", "before"),
    "global": ("global", "after"),
    "personal_before": ("personal", "before"),
    "personal": ("personal", "after"),
}


@dataclass(frozen=True)
class Job:
    """A run, or clients that join one.

    Attributes:
        cell: the cell in which the result counts.
        algorithm: name of the algorithm.
        rate: learning rate.
        seed: seed of rows, partition, initial adapter, cohorts and batches.
        folder: folder of the run. For clients that join it is the folder of the joined run.
        extra: settings that replace settings of the cell.
    """

    cell: Cell
    algorithm: str
    rate: float
    seed: int
    folder: Path
    extra: Mapping[str, Any]

    @property
    def joins(self) -> bool:
        """Whether the job is about clients that join a run."""
        return self.cell.regime.startswith(JOINED)

    @property
    def tunes(self) -> bool:
        """Whether the job serves to choose a learning rate."""
        return self.extra.get("eval", {}).get("split") == "val"

    @cached_property
    def config(self) -> Config:
        """The settings of the run."""
        return run_config(self.cell, self.algorithm, self.rate, self.seed, self.folder, self.extra)

    @property
    def record(self) -> Path:
        """The file with the measurements."""
        return self.folder / (JOINS if self.joins else MEASURED)

    @property
    def name(self) -> str:
        """The name for people."""
        why = " (tuning)" if self.tunes else ""
        return f"{self.cell.name} {self.algorithm} {self.rate:g} seed {self.seed}{why}"

    @property
    def steps(self) -> int:
        """Optimizer steps of all clients together. The time of a run is proportional to them."""
        tree = merged(settings(self.cell.base), self.extra)
        train, scenes = tree["train"], tree["data"].get("scenes", {})
        clients = train.get("clients_per_round") or scenes.get("sites", SITES)
        return clients * train["rounds"] * train["local_steps"]


def read(job: Job) -> dict[str, Any] | None:
    """The measurements of a job; None for an unfinished job.

    Raises:
        FedVLMError: the job was measured with other settings.
    """
    if not job.record.exists():
        return None
    found = json.loads(job.record.read_text(encoding="utf-8"))
    if found["settings"] != digest(job.config):
        raise FedVLMError(
            f"'{job.record.parent}' was measured with other settings; choose another folder with "
            "--output DIR, or remove that one"
        )
    return found


NEWER = (
    *(("data", "split_seed"), ("data", "max_images"), ("train", "patience")),
    *(("eval", "own"), ("eval", "global_before"), ("eval", "personal_before")),
    *(("model", "device_map"), ("model", "device_memory"), ("model", "shard")),
)
"""Settings that are newer than the first results, and have changed none by their default."""


def digest(config: Config) -> str:
    """A hash of all settings that can change a result.

    Settings that are newer than the first results count only where they change something.
    """
    tree = config.model_dump(exclude={"output", "engine", "report_to"})
    if config.aggregate.kind == "mean":
        del tree["aggregate"]
    for section, name in NEWER:
        own = getattr(config, section)
        if getattr(own, name) == type(own).model_fields[name].get_default(
            call_default_factory=True
        ):
            del tree[section][name]
    if config.privacy.unit is None and not config.privacy.canaries:
        del tree["privacy"]
    if not config.wire.secure:
        del tree["wire"]["secure"], tree["wire"]["bound"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def do(jobs: Iterable[Job], at_a_time: int, tell: comparison.Tell | None = None) -> list[str]:
    """Runs the unmeasured jobs. The next call repeats a failed job.

    Returns:
        The names of the failed jobs, each with its folder.
    """
    todo = [job for job in jobs if read(job) is None]
    for joins, work in ((False, measure), (True, join)):
        chosen = {job.name: job.config for job in todo if job.joins is joins}
        comparison.each(work, chosen, at_a_time, tell)
    return [f"{job.name}: see {job.folder}/{FAILED}" for job in todo if read(job) is None]


def measure(name: str, config: Config, tell: comparison.Tell) -> None:
    """Starts or resumes a run and measures it. An error is written to the folder of the run."""
    folder = Path(config.output)
    try:
        whole, began = not stores.is_run(folder), time.perf_counter()
        if whole:  # a process that died before its run began left this folder
            shutil.rmtree(folder, ignore_errors=True)
        if not comparison.done(config):
            comparison.run_one(name, config, tell)
        seconds = time.perf_counter() - began if whole else None
        lines = files.read_lines(folder / "metrics.jsonl")
        results = Results.read(folder)
        scores = clients_of(results)
        loss = results.summary("personal", "loss")["mean"]
        write(folder / MEASURED, config, seconds, rows_of(results, lines), loss, scores)
        prune(folder)
    except Exception:
        files.write_text(folder / FAILED, traceback.format_exc())


def join(name: str, config: Config, tell: comparison.Tell) -> None:
    """Lets new clients join a run and measures them. An error is written to the run's folder."""
    from fedvlm.after.onboard import onboard

    folder = Path(config.output)
    try:
        if not (folder / MEASURED).exists() or not stores.is_run(folder):
            measure(name, config, tell)
        if not (folder / MEASURED).exists():
            return
        began, found = time.perf_counter(), []
        for site, data in _new_sites(config).items():
            there = folder / "onboarded" / site / "scores.json"
            if not there.exists():
                onboard(folder, data, name=site)
            found.append(json.loads(there.read_text())["scores"])
        seconds = time.perf_counter() - began
        clients = {f"new-{k}": site["personal"] for k, site in enumerate(found)}
        write(folder / JOINS, config, seconds, joined_rows(found, config), scores=clients)
    except Exception:
        files.write_text(folder / FAILED, traceback.format_exc())


def rows_of(results: Results, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a run in the raw results, without the columns that identify the run."""
    metric, table = results.metric, results.table
    sent = {k: table[k] for k in ("steps", "passes")} | {
        "bytes_up": table["bytes"]["bytes_up"]["total"]
    }
    start = results.summary("untuned")
    found = [_row("untuned", "start", start, sent, None)]
    for name, (model, when) in MODELS.items():
        curve = {0: start["mean"]}
        for line in lines:
            if line["round"] and line["evaluation"]:
                clients = line["evaluation"][name]
                curve[line["round"]] = summarize({c: s[metric] for c, s in clients.items()})["mean"]
        found.append(_row(model, when, results.summary(name), sent, rounds_to(curve)))
    return found


def clients_of(results: Results) -> dict[str, dict[str, Any]]:
    """Scores of the personal models: client -> every metric, and the number of scored rows."""
    return {
        client: dict(scores)
        for client, scores in results.table["models"]["personal"]["clients"].items()
    }


def joined_rows(
    sites: list[Mapping[str, Mapping[str, float]]], config: Config
) -> list[dict[str, Any]]:
    """The rows of clients that joined. They send nothing, and they take part in no round."""
    found = []
    for model, when, name in (
        ("untuned", "start", "untuned"),
        ("global", "after", "shared"),
        ("personal", "after", "personal"),
    ):
        scores = {str(k): site[name][config.metric] for k, site in enumerate(sites)}
        found.append(
            _row(model, when, summarize(scores), {"steps": 0, "passes": 0, "bytes_up": 0}, None)
        )
    return found


def prune(folder: Path) -> None:
    """Removes the files that neither the results nor clients that join need."""
    for path in (*folder.glob("adapters/client-*"), folder / "personal", folder / "answers"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("*.png"):
        path.unlink()


def _row(
    model: str,
    when: str,
    summary: Mapping[str, float],
    sent: Mapping[str, float],
    rounds: int | None,
) -> dict[str, Any]:
    return {
        "model": model,
        "when": when,
        "mean": summary["mean"],
        "worst10": summary["worst10"],
        **{name: int(value) for name, value in sent.items()},
        "rounds_to_90": rounds,
    }


def write(
    path: Path,
    config: Config,
    seconds: float | None,
    rows: list[dict[str, Any]],
    loss: float | None = None,
    scores: Mapping[str, Any] | None = None,
    commit: str | None = None,
) -> None:
    """Writes the measurements of a run to ``path``.

    Args:
        path: the file.
        config: the settings of the run.
        seconds: wall time; None: not known, such as for a resumed run.
        rows: its rows in the raw results.
        loss: mean loss of the personal models.
        scores: client -> scores of its personal model.
        commit: the code of the run; None: the code of this process.
    """
    found = {
        "settings": digest(config),
        "seconds": seconds,
        "date": str(datetime.date.today()),
        "commit": commit or _commit(),
        "loss": loss,
        "rows": rows,
        "clients": scores or {},
    }
    (path.parent / FAILED).unlink(missing_ok=True)
    files.write_text(path, json.dumps(found, indent=1) + "\n")


@cache
def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "no commit"


def _new_sites(config: Config) -> dict[str, Path]:
    """Writes the rows of sites outside the run to its folder; returns site -> file."""
    from fedvlm.data.scenes import scenes

    asked = config.data.scenes
    wider = scenes(
        sites=asked.sites + JOINERS,
        rows=asked.rows,
        style=asked.style,
        strength=asked.strength,
        seed=config.seed,
    )
    found = {}
    for k in range(asked.sites, asked.sites + JOINERS):
        site = f"site-{k}"
        path = Path(config.output) / "new" / f"{site}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [i for i, name in enumerate(wider["site"]) if name == site]
        wider.select(kept).to_parquet(path)
        found[site] = path
    return found

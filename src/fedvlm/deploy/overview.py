"""What a server's files tell of its sites and its newest run: for status, monitoring and the page.

All of it comes from ``project.yml``, ``admitted.json``, the events of the jobs, and ``seen.json``,
which the server's process writes. Names of sites are those of the project. Reasons are one of
``REASONS``, so that whoever reads this has a known number of names.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedvlm.deploy.events import EVENTS, NewLines
from fedvlm.errors import brief

SEEN = "seen.json"
WRITTEN = 5.0  # seconds between two writings of seen.json
HEARD = 100.0  # seconds since the last message of a connected site; a heartbeat comes every 30
OVER = ("done", "renewed", "aborted", "error")  # the last event of a job is one of these
STATES = ("none", "running", *OVER)
REASONS = (
    "unreachable",
    "refused",
    "late",
    "worker_died",
    "failed",
    "invalid_answer",
    "wrong_form",
    "not_finite",
    "too_large",
)
"""Why a site's work did not count in a round. The last three are of uploads."""
PHASES = ("training", "transfer")
LATE = 2.0  # a site that needs more than this times its last round, and 10 seconds more, is late


def reason(event: Mapping[str, Any]) -> str:
    """The reason of an event ``failed`` or ``rejected``, one of ``REASONS``."""
    why = str(event.get("why", ""))
    if event["event"] == "rejected":
        if "finite" in why:
            return "not_finite"
        return "too_large" if "by a norm of" in why or "too large" in why else "wrong_form"
    if event.get("gone"):
        return "unreachable"
    kinds = {"refused": "refused", "timeout": "late", "died": "worker_died", "failed": "failed"}
    if "more than" in why and "bytes are" in why:
        return "too_large"
    return kinds.get(why.partition(":")[0], "invalid_answer")


@dataclass
class SiteNow:
    """A site, as the server knows it.

    Attributes:
        name: its name in the project.
        admitted: whether the server lets its key in.
        connected: whether it is connected now.
        seen: seconds since 1970 at its last message; None: never.
        trained: the last round of the newest run whose upload has arrived; None: none.
        seconds: seconds of that round, with its transfer.
        bytes_up: bytes that it has sent in the newest run.
        bytes_down: bytes that it was sent in the newest run.
        why: why its work of a later round does not count; empty if it does.
        since: seconds since 1970 at which the round began that it works in; None: it does not.
    """

    name: str
    admitted: bool = False
    connected: bool = False
    seen: float | None = None
    trained: int | None = None
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    why: str = ""
    since: float | None = None

    def late(self, now: float) -> bool:
        """Whether it works for much longer than in its last round."""
        working = 0.0 if self.since is None else now - self.since
        return self.trained is not None and working > LATE * self.seconds + 10.0


@dataclass
class RunNow:
    """The newest run.

    Attributes:
        output: the folder of its results, and ``run`` its number.
        planned: the number of its rounds.
        state: one of ``STATES``.
        round: the last finished round; None: not begun.
        at: seconds since 1970 at its last event.
        seconds: seconds of the last round.
        epsilon: what it has spent, where the server is told.
        error: the reason of the state ``error``.
    """

    output: str = ""
    run: str = ""
    planned: int = 0
    state: str = "none"
    round: int | None = None
    at: float | None = None
    seconds: float = 0.0
    epsilon: float | None = None
    error: str = ""


@dataclass
class Totals:
    """What all jobs of this federation did. The numbers only grow while their files are there.

    Attributes:
        rounds: finished rounds, and ``round_seconds`` their time.
        failures: (site, reason) -> rounds in which the site's work did not count.
        bytes: (site, ``up`` or ``down``) -> bytes of uploads and downloads.
        seconds: (site, phase) -> seconds.
    """

    rounds: int = 0
    round_seconds: float = 0.0
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: Counter[tuple[str, str]] = field(default_factory=Counter)


class Overview:
    """The state of a federation. :meth:`read` reads what is new in its files.

    Args:
        folder: the federation.
        names: the sites of the project.

    Attributes:
        sites: name -> the site, in the order of the project.
        run: the newest run.
        totals: of all jobs.
        written: seconds since 1970 at which the server wrote ``seen.json``; None: never.
    """

    def __init__(self, folder: Path, names: list[str]):
        self.folder, self.totals, self.run = folder, Totals(), RunNow()
        self.sites = {name: SiteNow(name) for name in names}
        self.written: float | None = None
        self._jobs: dict[Path, NewLines] = {}
        self._taking_part: list[str] = []
        self._sampled = False  # a round has some of the sites only, and nobody says which

    def read(self) -> Overview:
        """Reads what is new, and returns itself."""
        self._present()
        for job in sorted((self.folder / "runs").glob("*/job.json")):
            if job not in self._jobs:
                self._jobs[job] = NewLines(job.with_name(EVENTS))
                self._begin(json.loads(job.read_text()))
            for line in self._jobs[job]():
                self._note(json.loads(line))
        return self

    @property
    def alive(self) -> bool:
        """Whether the server's process was there some seconds ago, and has had a connection."""
        return self.written is not None and time.time() - self.written < 4 * WRITTEN

    @property
    def free(self) -> dict[str, int]:
        """Free bytes on the disks of the federation and of the run's results."""
        places = {"federation": self.folder}
        if self.run.output and Path(self.run.output).exists():
            places["results"] = Path(self.run.output)
        return {name: shutil.disk_usage(path).free for name, path in places.items()}

    def _present(self) -> None:
        known = _json(self.folder / "admitted.json").get("sites", {})
        found = _json(self.folder / "server" / SEEN)
        self.written = found.get("written")
        for name, site in self.sites.items():
            about = found.get("sites", {}).get(name, {})
            site.admitted = bool(known.get(name))
            site.seen = about.get("seen")
            recent = site.seen is not None and time.time() - site.seen < HEARD
            site.connected = self.alive and bool(about.get("connected")) and recent

    def _begin(self, job: Mapping[str, Any]) -> None:
        """Another job: of the same run, or of a new one."""
        output, planned = job["config"]["output"], job["config"]["train"]["rounds"]
        if output != self.run.output or not job["resume"]:
            self.run = RunNow(output, job["run"], planned)
            for site in self.sites.values():
                site.trained, site.seconds, site.bytes_up, site.bytes_down = None, 0.0, 0, 0
        for site in self.sites.values():
            site.since, site.why = None, ""
        self.run.state, self.run.error = "running", ""
        self._sampled = job["config"]["train"].get("clients_per_round") is not None

    def _note(self, event: Mapping[str, Any]) -> None:
        kind, run, totals = event["event"], self.run, self.totals
        run.at = event["time"]
        site = self.sites.get(str(event.get("site")))
        if kind in OVER:
            run.state, run.error = kind, brief(str(event.get("why", "")))
            for each in self.sites.values():
                each.since = None
        elif kind == "begun":
            self._taking_part = [name for name in event["sites"] if name in self.sites]
            self._next(event["time"])
        elif kind == "round":
            run.round, run.seconds = min(event["round"], run.planned), event["seconds"]
            run.epsilon = event.get("epsilon", run.epsilon)
            totals.rounds += event["round"] > 0
            totals.round_seconds += event["seconds"]
            for way in ("up", "down"):
                self._sent(way, event.get(f"bytes_{way}", {}))
            self._next(event["time"])
        if site is None:
            return
        if kind == "trained":
            site.trained, site.seconds, site.why = event["round"], event["seconds"], ""
            site.since = None
            there = min(event["seconds"], event.get("seconds_there", 0.0))
            totals.seconds[site.name, "training"] += there
            totals.seconds[site.name, "transfer"] += event["seconds"] - there
        elif kind in ("failed", "rejected"):
            totals.failures[site.name, reason(event)] += 1
            site.since, site.why = None, f"{reason(event)}: {brief(event['why'])}"
        elif kind == "benched":
            site.since = None
            site.why = site.why or "left out because it failed before"

    def _next(self, began: float) -> None:
        """A round begins for the sites that take part, unless it was the last one."""
        over = self.run.round is not None and self.run.round >= self.run.planned
        for name in self._taking_part:
            self.sites[name].since = None if over or self._sampled else began

    def _sent(self, way: str, by_site: Mapping[str, int]) -> None:
        for name, size in by_site.items():
            if name in self.sites:
                self.totals.bytes[name, way] += size
                total = getattr(self.sites[name], f"bytes_{way}") + size
                setattr(self.sites[name], f"bytes_{way}", total)


def _json(path: Path) -> dict[str, Any]:
    """The content of a file; empty if there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

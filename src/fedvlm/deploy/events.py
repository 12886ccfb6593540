"""The events of deployed runs, which their jobs write to files of the federation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedvlm.store import files

EVENTS = "events.jsonl"


class NewLines:
    """What another process has added to a file since the last call, as whole lines.

    Args:
        path: the file, which may not be there yet.
    """

    def __init__(self, path: Path):
        self.path, self._at = path, 0

    def __call__(self) -> list[bytes]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self._at)
            whole, end, _ = file.read().rpartition(b"\n")
        self._at += len(whole + end)
        return [line for line in whole.splitlines() if line]


def output_of(job: Path) -> str:
    """The folder for the results of a job.

    Args:
        job: the folder of the job.
    """
    return str(json.loads((job / "job.json").read_text())["config"]["output"])


def events_of(federation: Path, output: Path) -> list[dict[str, Any]]:
    """The events of all jobs of a run, the oldest first.

    Args:
        federation: the folder of the federation.
        output: the folder of the run.
    """
    jobs = (path.parent for path in (federation / "runs").glob("*/job.json"))
    own = [job for job in jobs if Path(output_of(job)) == output.absolute()]
    found = [event for job in own for event in files.read_lines(job / EVENTS)]
    return sorted(found, key=lambda event: event["time"])

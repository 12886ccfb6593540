"""The page of a run that goes on: its round, its sites, its curves; and later its report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedvlm.after.names import no_run
from fedvlm.errors import FedVLMError, brief
from fedvlm.metrics import size
from fedvlm.report import scores, sites
from fedvlm.report.folder import Run, read, read_run
from fedvlm.report.page import made, of
from fedvlm.report.parts import Page, Part, Section, Table, Text, table
from fedvlm.report.write import ROOM
from fedvlm.rounds.pictures import COMPARISON
from fedvlm.store import run as stores

REFRESH = 5  # seconds
EVENTS = 30  # the last events that are shown
Events = Sequence[Mapping[str, Any]]

HAPPENED = {
    "connected": "connected",
    "opened": "has opened the run",
    "trained": "has trained",
    "failed": "gave no answer",
    "rejected": "its upload was rejected",
    "bounded": "its change was shrunk",
    "capped": "counts as fewer rows than it claims",
    "benched": "is left out because it failed before",
}
"""Event of a site -> words."""


def page(folder: Path, events: Events = ()) -> Page:
    """The page of a folder now. It asks the browser to come again until the run is done.

    Args:
        folder: the folder of a run.
        events: the events of a deployed run, in order.
    """
    done = stores.is_done(folder) or (folder / COMPARISON).exists()
    if not done and not stores.is_run(folder):
        inside = any(folder.glob(f"*/{stores.CONFIG}"))
        waits = "The run has not begun yet."
        if not folder.exists():
            waits = f"There is no folder {folder.absolute()} yet. This page waits for it."
        why = f"{no_run(folder)}." if inside else waits
        return _waiting(folder, why, events)
    try:
        if done:
            return of(read(folder), ROOM)
        return _going_on(read_run(folder), events)
    except (FedVLMError, OSError) as error:  # a file is being written
        return _waiting(folder, str(error), events)


def _waiting(folder: Path, why: str, events: Events) -> Page:
    parts: list[Part] = [Text(why), *_deployed(events)]
    title = f"Run: {brief(folder.absolute().name, 60)}"
    lead = f"This page comes again every {REFRESH} seconds."
    return Page(title, lead, {}, [Section("now", "Now", parts)], made(), refresh=REFRESH)


def _going_on(run: Run, events: Events) -> Page:
    sections = [
        Section("now", "Now", [_sites_now(run), *_deployed(events)]),
        scores.curves_of_run(run),
        scores.of_run(run),
        sites.costs_of_run(run),
    ]
    title = f"Run: {brief(run.folder.absolute().name, 60)}"
    lead = f"The run is not done yet. This page comes again every {REFRESH} seconds."
    return Page(title, lead, dict(_facts(run)), sections, made(), refresh=REFRESH)


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    planned = run.config.train.rounds
    yield "Algorithm", run.config.algorithm.name
    yield "Round", f"{min(run.round, planned)} of {planned} done"
    ago = time.time() - (run.folder / stores.CHECKPOINT).stat().st_mtime
    yield "Last round", f"done {sites.duration(max(0.0, ago))} ago"
    seconds = [line["seconds"] for line in run.timing if "seconds" in line]
    if seconds:
        mean = sum(seconds) / len(seconds)
        yield "Time of a round", f"{sites.duration(mean)} on average"
        left = sites.duration(mean * max(0, planned - run.round))
        yield "Left", f"about {left}, without the ending"
    if epsilon := [line["epsilon"] for line in run.lines if "epsilon" in line]:
        yield "Epsilon so far", f"{epsilon[-1]:.4g}"


def _sites_now(run: Run) -> Table:
    """A row a site: its last round, loss and bytes."""
    last: dict[str, Mapping[str, Any]] = {}
    sent: dict[str, int] = {}
    for line in run.lines:
        for site in line.get("cohort", ()):
            if site not in line.get("missing", ()):
                last[site] = line
            sent[site] = sent.get(site, 0) + line.get("bytes_up", {}).get(site, 0)
    rows = []
    for site in run.clients:
        line = last.get(site, {})
        loss = line.get("train_loss", {}).get(site)
        told = "" if loss is None else f"{loss:.3f}"
        rows.append((site, str(line.get("round", "")), told, size(sent.get(site, 0))))
    heads = ("site", "last round", "loss in training", "sent up")
    return table("Sites", heads, rows, more="metrics.jsonl")


def _deployed(events: Events) -> Iterator[Part]:
    """The sites of a deployed run as the events tell, and the last events."""
    if not events:
        return
    now, last = time.time(), {}
    for event in events:
        if event.get("site"):
            last[str(event["site"])] = event
    rows = [
        (site, f"{sites.duration(max(0.0, now - event['time']))} ago", _words(event))
        for site, event in last.items()
    ]
    yield table(
        "When the server last heard of a site", ("site", "heard", "last event"), rows, texts=(1, 2)
    )
    told = [
        (f"{datetime.fromtimestamp(e['time'], UTC):%H:%M:%S}", str(e.get("site", "")), _words(e))
        for e in reversed(events[-EVENTS:])
    ]
    heads = ("UTC", "site", "event")
    yield table(f"The last {len(told)} events", heads, told, texts=(1, 2), folded=True)


def _words(event: Mapping[str, Any]) -> str:
    """An event in words. Its reason may come from a site."""
    kind = str(event.get("event"))
    text = HAPPENED.get(kind, kind)
    if event.get("round"):
        text += f", round {event['round']}"
    if event.get("bytes_up"):
        text += f", {size(event['bytes_up'])} up"
    return f"{text}: {brief(event['why'])}" if event.get("why") else text

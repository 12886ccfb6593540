"""``fedvlm deploy status``: the sites, the jobs and the newest run, once or as a screen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedvlm.deploy.overview import Overview, SiteNow

HOME = "federation"
Folder = Annotated[
    str, typer.Option("--federation", "-f", metavar="DIR", help="the folder of 'deploy init'")
]
PAUSE = 2.0  # seconds between two screens


def status(
    folder: Folder = HOME,
    watch: Annotated[
        bool, typer.Option("--watch", help="show sites, rounds and bytes until Ctrl-C")
    ] = False,
) -> None:
    """Show which sites are connected and which jobs run.

    With --watch, one screen has the newest run, what each site does, and who is late and why. It
    reads files of the federation only.
    """
    from fedvlm.deploy.nvflare.ending import warnings
    from fedvlm.deploy.nvflare.federation import Federation

    federation = Federation(folder)
    if watch:
        _watch(Path(folder), federation.project.sites)
        return
    found = federation.status()
    for name in federation.project.sites:
        state = "connected" if name in found["sites"] else "not connected"
        typer.echo(f"{name:<24} {state if name in federation.sites else 'not admitted'}")
    for job in found["jobs"]:
        typer.echo(f"job {job['job_id']}  {job.get('status')}")
    if not found["jobs"]:
        typer.echo("no job is running")
    for warning in warnings(federation.folder, federation.project):
        typer.echo(warning)


def _watch(folder: Path, sites: list[str]) -> None:
    from rich.live import Live

    from fedvlm.deploy.overview import Overview

    known = Overview(folder.absolute(), sites)
    with contextlib.suppress(KeyboardInterrupt), Live(screen(known), auto_refresh=False) as live:
        while True:
            live.update(screen(known), refresh=True)
            time.sleep(PAUSE)


def screen(known: Overview) -> RenderableType:
    """All that is known now. Names and reasons are text: nothing in them is markup."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from fedvlm.metrics import size

    now, known = time.time(), known.read()
    table = Table("site", "state", "heard", "round", "took", "sent", "received", "note")
    for site in known.sites.values():
        cells = (
            site.name,
            _state(site),
            _ago(site.seen, now),
            "" if site.trained is None else str(site.trained),
            f"{site.seconds:.1f} s" if site.seconds else "",
            size(site.bytes_up) if site.bytes_up else "",
            size(site.bytes_down) if site.bytes_down else "",
            _note(site, now),
        )
        table.add_row(*map(Text, cells))
    return Group(*(Text(line) for line in _about(known, now)), table)


def _about(known: Overview, now: float) -> Iterator[str]:
    run = known.run
    if not known.alive:
        yield "the server has written nothing for a while, or no site has ever connected"
    if run.state == "none":
        yield "no run has been submitted"
        return
    done = "none" if run.round is None else run.round
    yield f"{run.output}: {run.state}, {done} of {run.planned} rounds done"
    if run.at is not None:
        yield f"last event {_ago(run.at, now)}, last round {run.seconds:.1f} s"
    if run.epsilon is not None:
        yield f"epsilon so far {run.epsilon:.4g}"
    if run.error:
        yield f"error: {run.error}"


def _state(site: SiteNow) -> str:
    if not site.admitted:
        return "not admitted"
    return "connected" if site.connected else "not connected"


def _note(site: SiteNow, now: float) -> str:
    if site.why:
        return site.why
    if site.since is None:
        return ""
    return f"{'LATE, ' if site.late(now) else ''}working for {now - site.since:.0f} s"


def _ago(when: float | None, now: float) -> str:
    """A time in the past, such as ``5 s ago``; empty if there is none."""
    from fedvlm.report.sites import duration

    return "" if when is None else f"{duration(max(0.0, now - when))} ago"

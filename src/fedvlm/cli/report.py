"""``fedvlm report``, ``watch`` and ``plot``: a run or a comparison in a browser and as pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def report(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="the folder of a run or of a comparison")
    ],
    open_: Annotated[bool, typer.Option("--open", help="open the report in a browser")] = False,
) -> None:
    """Make the HTML report of a run or a comparison again, from its files.

    The report of an unfinished run has the rounds so far.
    """
    from fedvlm.report.write import write_report

    path = write_report(folder)
    typer.echo(path)
    if open_ and not _opened(path.absolute().as_uri()):
        typer.echo("no browser could be started here; open the file above in one", err=True)


def watch(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="the folder of a run")],
    open_: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="the port; 0: any free port")] = 0,
    federation: Annotated[
        str,
        typer.Option(
            "--federation", "-f", metavar="DIR", help="of a deployed run: the federation's folder"
        ),
    ] = "federation",
) -> None:
    """Show a run in a browser on this machine while it goes on.

    The page is on 127.0.0.1 alone, at an address that nobody can guess. Ctrl-C ends the page, not
    the run.
    """
    from fedvlm.report.watch import Watch

    with Watch(Path(folder), lambda: _events(federation, folder), port) as server:
        typer.echo(f"{server.address}\nCtrl-C ends this page, not the run")
        if open_ and not _opened(server.address):
            typer.echo("no browser could be started here; open the address above in one", err=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _events(federation: str, folder: str) -> list[dict[str, Any]]:
    """The events of a deployed run; none for a run on this machine."""
    from fedvlm.deploy.events import events_of

    return events_of(Path(federation), Path(folder))


def plot(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="the folder of a run or of a comparison")
    ],
) -> None:
    """Draw the pictures of a run or a comparison again, from its files."""
    from fedvlm.rounds.pictures import redraw

    for path in redraw(folder):
        typer.echo(path)


def reported(folder: Path) -> None:
    """Writes the report of a finished run, and prints its path."""
    from fedvlm.report.write import after

    after(folder, _told)


def reported_early(folders: Sequence[Path]) -> None:
    """Writes the reports of the runs of a comparison that are done, while others go on."""
    from fedvlm.report.write import after_runs

    after_runs(folders)


def reported_all(folder: Path) -> None:
    """Writes the reports of a finished comparison and of its runs; prints the path of the first."""
    from fedvlm.report.write import after_comparison

    after_comparison(folder, _told)


def _told(path: Path) -> None:
    typer.echo(f"report: {path}")


def _opened(address: str) -> bool:
    """Opens a page in a browser; False without one."""
    import webbrowser

    return webbrowser.open(address)

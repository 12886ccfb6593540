"""``fedvlm report``: the HTML report of a run or of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    if open_ and not _opened(path):
        typer.echo("no browser could be started here; open the file above in one", err=True)


def reported(folder: Path) -> None:
    """Writes the report of a finished run or comparison, and prints its path."""
    from fedvlm.report.write import after

    after(folder, lambda path: typer.echo(f"report: {path}"))


def _opened(path: Path) -> bool:
    """Opens a page in a browser; False without one."""
    import webbrowser

    return webbrowser.open(path.absolute().as_uri())

"""``fedvlm audit-log``: check the log of all requests and answers."""

from __future__ import annotations

from typing import Annotated

import typer

from fedvlm.errors import visible

audit_log = typer.Typer(
    no_args_is_help=True, help="Check the audit log of a site or of a run at the server."
)


@audit_log.callback()
def _several() -> None:
    """Keeps ``verify`` a command of its own, so that others can follow."""


@audit_log.command()
def verify(
    file: Annotated[str, typer.Argument(metavar="FILE", help="audit.jsonl")],
    noted: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="a last hash that was printed earlier"),
    ] = None,
) -> None:
    """Find changed, dropped and moved lines.

    Missing lines at the end show only against a hash that was noted elsewhere.
    """
    from fedvlm.deploy.auditlog import verify as checked

    found = checked(file, noted)
    about = ", ".join(f"{key} {value}" for key, value in found.first.items())
    typer.echo(visible(f"{found.lines} lines, all linked; {about}"))
    if found.torn:
        typer.echo(
            f"after them, {found.torn} bytes of a line that a killed process did not finish; the "
            "next line closes it"
        )
    if noted:
        typer.echo("the noted line is there: nothing before it was removed")
    typer.echo(f"last hash: {found.last}")
    typer.echo("note this hash elsewhere: without it, nobody can see that the end was cut off")

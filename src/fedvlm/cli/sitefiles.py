"""``fedvlm site erase`` and ``fedvlm site digest``: a site's files, and its models' digests."""

from __future__ import annotations

from typing import Annotated

import typer

GONE = """\
not removed: rows and models outside of the state folder, backups, snapshots and swap. An SSD may
keep bytes that were overwritten or removed; only an encrypted disk whose key is destroyed keeps
none. The server keeps what it was sent."""
LOGS = "the logs site.log and nvflare.log keep the lines about this run"


def erase(
    state: Annotated[str, typer.Option(metavar="DIR", help="the folder of 'site start'")],
    run: Annotated[
        str | None, typer.Option(metavar="RUN", help="one run, and the caches; else everything")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Remove a run from this site, or all that fedvlm keeps here. The site must be stopped."""
    from fedvlm.deploy import statefolder

    found = statefolder.remains(state, run)
    if not yes:
        typer.echo("this would remove:")
        for path in found:
            typer.echo(f"  {path}")
        typer.confirm("remove all of this for good?", abort=True)
    for path, size in statefolder.erase(state, run):
        typer.echo(f"removed {path} ({size} bytes)")
    if run is not None:
        typer.echo(LOGS)
    typer.echo(GONE)


def digest(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="a model's folder")],
) -> None:
    """Print the digest of a model's folder, for models.NAME.sha256 of a site's policy."""
    from fedvlm.models.pin import pin

    typer.echo(pin(folder).digest)

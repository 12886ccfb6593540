"""``fedvlm site erase``, ``budget`` and ``digest``: a site's files, and its models' digests."""

from __future__ import annotations

from typing import Annotated

import typer

from fedvlm.errors import FedVLMError, shown, visible

GONE = """\
not removed: rows and models outside of the state folder, backups, snapshots and swap. An SSD may
keep bytes that were overwritten or removed; only an encrypted disk whose key is destroyed keeps
none. The server keeps what it was sent."""
FORGOTTEN = """\
this removes the ledger of differential privacy: nobody can then count what runs have spent"""
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
    from fedvlm.deploy.spending import FOLDER

    found = statefolder.remains(state, run)
    if not yes:
        typer.echo("this would remove:")
        for path in found:
            typer.echo(f"  {path}")
        if any(path.name == FOLDER for path in found):
            typer.echo(FORGOTTEN)
        typer.confirm("remove all of this for good?", abort=True)
    for path, size in statefolder.erase(state, run):
        typer.echo(f"removed {path} ({size} bytes)")
    if run is not None:
        typer.echo(LOGS)
    typer.echo(GONE)


def budget(
    state: Annotated[str, typer.Option(metavar="DIR", help="the folder of 'site start'")],
    policy: Annotated[
        str | None, typer.Option(metavar="FILE", help="the policy of 'site start', with the limit")
    ] = None,
) -> None:
    """Show what runs under differential privacy have spent, on which rows, and what is left."""
    from pathlib import Path

    from fedvlm.deploy.balance import listed
    from fedvlm.deploy.policy import read_policy

    if not Path(state).is_dir():
        raise FedVLMError(f"--state {shown(state, 200)}: there is no such folder")
    for line in listed(state, read_policy(policy)):
        typer.echo(visible(line))


def digest(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="a model's folder")],
) -> None:
    """Print the digest of a model's folder, for models.NAME.sha256 of a site's policy."""
    from fedvlm.models.pin import pin

    typer.echo(pin(folder).digest)

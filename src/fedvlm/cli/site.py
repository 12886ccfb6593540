"""``fedvlm site``: take part in runs with one site's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedvlm.cli import sitefiles
from fedvlm.cli.options import needs_nvflare

site = typer.Typer(no_args_is_help=True, help="Take part in runs with one site's rows.")
site.callback()(needs_nvflare)


@site.command()
def start(
    kit: Annotated[str, typer.Argument(metavar="KIT.zip", help="this site's start-up kit")],
    data: Annotated[str, typer.Option(help="this site's rows: parquet, JSONL or a folder")],
    state: Annotated[
        str, typer.Option(metavar="DIR", help="folder for personal state, models and logs")
    ],
    policy: Annotated[
        str | None, typer.Option(metavar="FILE", help="limits what a run may ask of this site")
    ] = None,
    systemd: Annotated[
        bool, typer.Option("--systemd", help="print a systemd unit and exit")
    ] = False,
) -> None:
    """Take part in runs with this site's rows until stopped.

    The command stays in the foreground.
    """
    from fedvlm.deploy.nvflare.processes import start_site, systemd_unit

    if systemd:
        typer.echo(systemd_unit(kit, data, state, policy), nl=False)
        return
    start_site(kit, data, Path(state), policy, typer.echo)


site.command()(sitefiles.erase)
site.command()(sitefiles.digest)

"""``fedvlm site``: take part in runs with one site's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedvlm.cli import approvals, backups, sitefiles
from fedvlm.cli.options import USER, CredentialOption, SystemdOption, UserOption, needs_nvflare
from fedvlm.errors import visible

site = typer.Typer(no_args_is_help=True, help="Take part in runs with one site's rows.")
site.callback()(needs_nvflare)
for command in (approvals.requests, approvals.approve, approvals.refuse):
    site.command()(command)

State = Annotated[str, typer.Option(metavar="DIR", help="the site's folder, which has its key")]
To = Annotated[
    str | None, typer.Option(metavar="FILE", help="the request; default: NAME.request here")
]


@site.command()
def start(
    data: Annotated[str, typer.Option(help="this site's rows: parquet, JSONL or a folder")],
    state: Annotated[
        str, typer.Option(metavar="DIR", help="folder with the key, for personal state and logs")
    ],
    policy: Annotated[
        str | None, typer.Option(metavar="FILE", help="limits what a run may ask of this site")
    ] = None,
    systemd: SystemdOption = False,
    user: UserOption = USER,
    credential: CredentialOption = None,
) -> None:
    """Take part in runs with this site's rows until stopped.

    The command stays in the foreground.
    """
    if systemd:
        from fedvlm.deploy.units import site_unit

        unit = site_unit(data, state, policy, user=user, credential=credential)
        typer.echo(unit, nl=False)
        return
    from fedvlm.deploy.nvflare.processes import start_site

    start_site(data, Path(state), policy, typer.echo)


@site.command()
def check(
    data: Annotated[str, typer.Argument(help="this site's rows: parquet, JSONL or a folder")],
    policy: Annotated[
        str | None, typer.Option(metavar="FILE", help="the policy of 'site start'")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="load this model of the policy, and check every row"),
    ] = None,
    state: Annotated[
        str, typer.Option(metavar="DIR", help="the state of 'site start', for the room on its disk")
    ] = ".",
    answers: Annotated[
        bool, typer.Option("--answers/--no-answers", help="show the most frequent answers")
    ] = True,
) -> None:
    """Say what a run would find at this site, without a connection.

    Columns, counts, answers, unusable rows, what earlier runs have spent of the rows' privacy, the
    models' digests and the room on the disk. All problems are listed at once, and then the exit
    code is 2. 'site start' does this first.
    """
    from fedvlm.deploy.sitecheck import check as checked

    report = checked(data, policy, model, state, answers)
    for line in report.found:
        typer.echo(visible(line))
    report.raise_all()


@site.command()
def join(
    file: Annotated[
        str,
        typer.Argument(
            metavar="NAME.invitation|NAME.admission", help="the file that the operator has sent"
        ),
    ],
    state: State,
    to: To = None,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="make a new key, for a lost or revoked one")
    ] = False,
) -> None:
    """Join a federation: make this site's key and a request, then take the admission.

    Run it twice: with the invitation, and with the admission that answers the request.
    """
    from fedvlm.deploy.nvflare import joining, keys

    home = Path(state).absolute()
    if isinstance(keys.read(file, keys.Invitation, keys.Admission), keys.Admission):
        until = joining.install(file, home)
        typer.echo(f"admitted until {until}; (re)start 'fedvlm site start --state {state}'")
        return
    path = joining.join(file, home, Path(to) if to else None, new_key)
    _tell_request(path, state)


@site.command()
def renew(state: State, to: To = None) -> None:
    """Make a new key, and ask for its certificate before the present one ends."""
    from fedvlm.deploy.nvflare import joining

    path = joining.renew(Path(state).absolute(), Path(to) if to else None)
    _tell_request(path, state)


@site.command()
def fingerprint(state: State) -> None:
    """Show the fingerprints of the federation and of this site's keys.

    The last one is that of the key for secure aggregation. It goes to the other sites, into 'peers'
    of their policies, and not through the operator.
    """
    from fedvlm.deploy.nvflare import joining, keys
    from fedvlm.deploy.peers import identity

    about = joining.joined(Path(state).absolute(), waiting=True)
    typer.echo(f"site '{about.site}' of '{about.project}', server {about.address}:{about.port}")
    named = {"federation": "federation", "key": "this site", "next": "its new key"}
    for name, mark in joining.fingerprints(Path(state).absolute()).items():
        typer.echo(f"{named[name]:<12} {keys.grouped(mark)}")
    mark = identity(Path(state).absolute(), about.site).fingerprint
    typer.echo(f"{'for peers':<12} {keys.grouped(mark)}")


def _tell_request(path: Path, state: str) -> None:
    """Tells a person what to do with a request."""
    fingerprint(state)
    typer.echo(f"send {path} to the operator, and compare both fingerprints by telephone")
    typer.echo(f"then: fedvlm site join NAME.admission --state {state}")


site.command()(sitefiles.budget)
site.command()(sitefiles.erase)
site.command("backup")(backups.site_backup)
site.command("restore")(backups.site_restore)
site.command()(sitefiles.digest)

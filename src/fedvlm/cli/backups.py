"""``fedvlm site backup`` and ``restore``, ``fedvlm deploy backup`` and ``restore``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from fedvlm.cli.status import HOME, Folder
from fedvlm.errors import FedVLMError, counted

State = Annotated[str, typer.Option(metavar="DIR", help="the folder of 'site start'")]
Target = Annotated[str, typer.Argument(metavar="FILE.tar", help="the backup; it must not exist")]
Source = Annotated[str, typer.Argument(metavar="FILE.tar", help="a backup")]
Keys = Annotated[bool, typer.Option("--keys", help="also the private keys, in the clear")]
SITE_CLEAR = """\
it holds answers and reference answers of your rows, personal adapters, and the key of the ledger's
marks, and it is not encrypted: keep it like the rows, or encrypt it (age, gpg)"""
SITE_KEYS = "it also holds the site's private keys: whoever has it can take part as this site"
SITE_NO_KEYS = """\
the site's private keys are not in it (--keys). Without them, a restored site needs another key:
'fedvlm site join NAME.invitation --new-key', and 'fedvlm deploy admit --replace' at the server"""
KEYS = "it also holds the authority's and the operator's private keys, and is not encrypted"
NO_KEYS = """\
the private keys are not in it (--keys). Without them, and without a copy of ca/, server/ and admin/
elsewhere, a restored federation is a new one, which all sites must join again"""


def site_backup(file: Target, state: State, keys: Keys = False) -> None:
    """Copy a site's runs, logs and ledger into one file. The site may be connected, but idle."""
    from fedvlm.deploy.backup import back_up_site

    _told(file, back_up_site(state, file, keys))
    typer.echo(SITE_CLEAR)
    typer.echo(SITE_KEYS if keys else SITE_NO_KEYS)


def site_restore(
    file: Source,
    state: State,
    yes: Annotated[
        bool, typer.Option("--yes", help="do not ask about a ledger that may be too old")
    ] = False,
) -> None:
    """Restore a site's state into a new folder.

    What runs have spent must not be forgotten. If a folder 'spending' of this site survived, copy
    it into DIR first: it is kept if it is newer than the one in the backup.
    """
    from fedvlm.deploy.backup import restore_site

    def confirm(question: str) -> bool:
        if not yes and not sys.stdin.isatty():
            raise FedVLMError(f"{question} Answer with --yes")
        typer.echo(question)
        return yes or typer.confirm("go on?")

    about = restore_site(file, state, confirm)
    typer.echo(f"restored {state} as it was at {about['time']}")
    if not about["keys"]:
        typer.echo(SITE_NO_KEYS)


def deploy_backup(
    file: Target,
    folder: Folder = HOME,
    run: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="the results of a run; may be repeated"),
    ] = None,
    keys: Keys = False,
) -> None:
    """Copy a federation, and the results of runs, into one file."""
    from fedvlm.deploy.backup import back_up_federation

    _told(file, back_up_federation(folder, run or [], file, keys))
    typer.echo(KEYS if keys else NO_KEYS)


def deploy_restore(
    file: Source,
    folder: Folder = HOME,
    runs: Annotated[
        str, typer.Option(metavar="DIR", help="gets the results of the runs in the backup")
    ] = "runs",
) -> None:
    """Restore a federation, and the results of runs, into new folders."""
    from fedvlm.deploy.backup import restore_federation

    about = restore_federation(file, folder, runs)
    typer.echo(f"restored {folder} as it was at {about['time']}")
    typer.echo("a key that was revoked since then is admitted again: give 'deploy revoke' again")
    if not about["keys"]:
        typer.echo(NO_KEYS)


def _told(file: str, about: dict[str, Any]) -> None:
    typer.echo(f"{file}: {counted(len(about['files']), 'file')}, as they were at {about['time']}")

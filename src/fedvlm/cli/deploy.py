"""``fedvlm deploy``: runs over real machines, seen from the server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedvlm.cli import backups
from fedvlm.cli.options import (
    USER,
    CredentialOption,
    QuietOption,
    SystemdOption,
    UserOption,
    Words,
    needs_nvflare,
    parse,
)
from fedvlm.cli.report import reported
from fedvlm.cli.status import HOME, Folder, status
from fedvlm.errors import ConfigError, FedVLMError, counted

STAYED = "personal adapters and all answers stay at the sites, in STATE/runs/"

deploy = typer.Typer(no_args_is_help=True, help="Run over real machines with NVFlare.")
deploy.callback()(needs_nvflare)


@deploy.command()
def init(
    project: Annotated[
        str, typer.Argument(metavar="PROJECT.yml", help="describes the server and the sites")
    ],
    to: Annotated[str, typer.Option(metavar="DIR", help="folder for keys and invitations")] = HOME,
) -> None:
    """Make the operator's keys, and an invitation for every site."""
    from fedvlm.deploy.nvflare.project import provision, read_project

    kits = provision(read_project(project), Path(to))
    for name, path in kits.items():
        if path.is_file():
            typer.echo(f"{name}: send {path} to this site; it holds no secret")
    _tell_fingerprints(to)
    typer.echo(f"{to}/ca has the authority's private key: keep it on this machine, or offline")
    typer.echo(f"next: fedvlm deploy server -f {to}, and fedvlm deploy admit NAME.request -f {to}")


@deploy.command()
def admit(
    request: Annotated[
        str, typer.Argument(metavar="NAME.request", help="the file of 'site join' or 'site renew'")
    ],
    fingerprint: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="the fingerprint that the site has read out to you"),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="revoke the site's present keys, for a lost key")
    ] = False,
    folder: Folder = HOME,
) -> None:
    """Sign the key of a site, and let the site in."""
    from fedvlm.deploy.nvflare import keys
    from fedvlm.deploy.nvflare.admitting import admit as sign

    expected = keys.typed(fingerprint) if fingerprint else None

    def confirm(site: str, mark: str) -> bool:
        typer.echo(f"site '{site}' asks with the key\n  {keys.grouped(mark)}")
        if expected is not None:
            return expected == mark
        if not sys.stdin.isatty():
            raise FedVLMError(
                "ask the site for its fingerprint ('fedvlm site fingerprint'), by telephone for "
                "example, and give it: --fingerprint HEX"
            )
        return typer.confirm("Has the site read out the same fingerprint to you?")

    path = sign(Path(folder), request, confirm, replace)
    typer.echo(f"admitted; send {path} to the site, which runs 'fedvlm site join' with it")


@deploy.command()
def revoke(
    site: Annotated[str, typer.Argument(metavar="SITE", help="the site's name")],
    folder: Folder = HOME,
) -> None:
    """Refuse all keys of a site from now on.

    The running server closes the site's connection within seconds.
    """
    from fedvlm.deploy.nvflare import keys
    from fedvlm.deploy.nvflare.admitting import revoke as refuse

    for mark in refuse(Path(folder), site):
        typer.echo(f"revoked: {keys.grouped(mark)}")
    typer.echo(
        f"'{site}' can take part again with a new key: 'fedvlm site join {site}.invitation "
        "--new-key' at the site"
    )


@deploy.command()
def renew(folder: Folder = HOME) -> None:
    """Renew the certificates of the authority, the server, the operator and all admitted sites.

    All keep their keys, so the fingerprints stay. Restart the server, and send each site its
    admission.
    """
    from fedvlm.deploy.nvflare.admitting import renew as renewed
    from fedvlm.deploy.nvflare.project import admitted

    found, home = renewed(Path(folder)), Path(folder)
    for who, end in found.items():
        typer.echo(f"{who:<12} until {end:%Y-%m-%d}")
    for site in admitted(home)["sites"]:
        path = home / "sites" / f"{site}.admission"
        if site in found:
            typer.echo(f"{site}: send {path}, for 'fedvlm site join', and restart the site")
        else:
            typer.echo(f"{site}: its certificate is not here; it renews with 'fedvlm site renew'")
    typer.echo(f"restart the server: fedvlm deploy server -f {folder}")


@deploy.command()
def fingerprints(folder: Folder = HOME) -> None:
    """Show the fingerprints of the federation, the operator and the admitted sites."""
    _tell_fingerprints(folder)


def _tell_fingerprints(folder: str) -> None:
    from fedvlm.deploy.nvflare import keys
    from fedvlm.deploy.nvflare.admitting import fingerprints as listed

    for name, mark in listed(Path(folder)).items():
        typer.echo(f"{name:<12} {keys.grouped(mark) or 'not admitted'}")


@deploy.command()
def server(
    folder: Folder = HOME,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS:]PORT", help="let Prometheus ask here; without ADDRESS: 127.0.0.1"
        ),
    ] = None,
    systemd: SystemdOption = False,
    runs: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="with --systemd: the folder for results; default: runs beside the federation",
        ),
    ] = None,
    user: UserOption = USER,
    credential: CredentialOption = None,
) -> None:
    """Run the server of a federation in the foreground."""
    if systemd:
        from fedvlm.deploy.units import server_unit

        more = ["--metrics", metrics] if metrics else []
        typer.echo(server_unit(folder, runs, more, user=user, credential=credential), nl=False)
        return
    from fedvlm.deploy.nvflare.processes import serve

    serve(Path(folder), typer.echo, metrics)


@deploy.command()
def run(
    words: Words = None,
    resume: Annotated[
        str | None, typer.Option(metavar="DIR", help="resume the unfinished run in DIR")
    ] = None,
    folder: Folder = HOME,
    min_sites: Annotated[int, typer.Option(help="minimum number of sites in a round")] = 1,
    wait: Annotated[float, typer.Option(help="seconds to wait for all sites")] = 60.0,
    round_deadline: Annotated[int, typer.Option(help="seconds for training in a round")] = 3600,
    quiet: QuietOption = False,
) -> None:
    """Fine-tune over the connected sites and show the progress.

    Run this command on the server's machine.
    """
    from fedvlm import config as configs
    from fedvlm.cli.tables import print_run
    from fedvlm.deploy.nvflare import federation as runs
    from fedvlm.deploy.remote import Limits

    if resume and words:
        raise ConfigError(["--resume uses the run's saved configuration; leave out the others"])
    source, overrides = parse(words)
    settings = runs.saved(resume) if resume else configs.load(source, *overrides)
    federation = runs.Federation(folder)
    if not 1 <= min_sites <= len(federation.project.sites):
        raise ConfigError(
            [
                f"--min-sites {min_sites}: the federation has "
                f"{counted(len(federation.project.sites), 'site')}"
            ]
        )
    try:
        results = federation.run(
            settings,
            resume=bool(resume),
            limits=Limits(min_sites=min_sites, train_s=round_deadline),
            wait=wait,
            tell=(lambda event: None) if quiet else Shown().tell,
        )
    except KeyboardInterrupt:
        typer.echo(
            "\nno progress is shown any more, but the run continues. "
            f"End it with: fedvlm deploy abort -f {folder}",
            err=True,
        )
        sys.exit(130)
    print_run(results)
    reported(results.folder)
    typer.echo(STAYED)


deploy.command()(status)
deploy.command("backup")(backups.deploy_backup)
deploy.command("restore")(backups.deploy_restore)


@deploy.command()
def abort(folder: Folder = HOME) -> None:
    """End the running job; finished rounds are kept."""
    from fedvlm.deploy.nvflare.federation import Federation

    ended = Federation(folder).abort()
    typer.echo(f"ended: {', '.join(ended)}" if ended else "no job is running")


@deploy.command()
def readmit(folder: Folder = HOME) -> None:
    """Let sites that were away take part again from the next round."""
    from fedvlm.deploy.nvflare.federation import Federation

    found = Federation(folder).readmit()
    told = "after this round, your 'fedvlm deploy run' continues with all connected sites"
    typer.echo(told if found else "no job is running")


@deploy.command()
def demo(
    to: Annotated[str, typer.Option(metavar="DIR", help="folder for all files")] = "runs/deploy",
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    secure: Annotated[
        bool, typer.Option("--secure", help="secure aggregation, with pinned keys at the sites")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Try it on this machine: a server and three sites.

    The server and the sites are real processes that connect by mutual TLS.
    """
    from fedvlm.cli.tables import print_run
    from fedvlm.deploy.nvflare.demo import demo as show

    tell = (lambda event: None) if quiet else Shown().tell
    results = show(Path(to), list(words or []), tell, secure)
    print_run(results)
    reported(results.folder)
    typer.echo(STAYED)


class Shown:
    """Prints events as lines of text."""

    def tell(self, event: dict[str, Any]) -> None:
        text = line(event)
        if text:
            typer.echo(plain(text))


def plain(text: str) -> str:
    """Text without characters that steer a terminal, since part of it comes from a site."""
    whole = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return whole.replace("\n", "\n    ")


def line(event: dict[str, Any]) -> str:
    """An event as a line of text; empty for an event that is not shown."""
    kind, name = event["event"], event.get("site")
    if kind == "connected":
        return f"  {name}: connected"
    if kind == "opened":
        rows = event.get("rows")
        told = f"{rows['train']} train, {rows['val']} val, {rows['test']} test rows" if rows else ""
        return f"  {name}: ready, {told or 'number of rows not reported'}"
    if kind == "trained":
        loss = f"loss {event['loss']:.3f}, " if event.get("loss") is not None else ""
        return (
            f"  {name}: round {event['round']}, {loss}"
            f"{event['bytes_up'] / 1000:.1f} kB up, {event['seconds']:.1f} s"
        )
    if kind == "summed":
        loss = "" if event["loss"] is None else f", loss {event['loss']:.3f}"
        told = f"  the secure sum of {', '.join(event['sites'])}: round {event['round']}{loss}"
        return "; ".join([told, *event["odd"]])
    if kind == "void":
        return f"  VOID: round {event['round']} changes nothing: {event['why']}"
    if kind == "failed":
        return f"  {name}: FAILED in round {event['round']}: {event['why']}"
    if kind == "rejected":
        return f"  {name}: REJECTED in round {event['round']}: {event['why']}"
    if kind == "bounded":
        return (
            f"  {name}: round {event['round']}, change shrunk from norm {event['norm']:.4g} to "
            f"{event['bound']:.4g} (aggregate.bound)"
        )
    if kind == "capped":
        why = "rows of project.yml" if event["registered"] else "max_weight of project.yml"
        return f"  {name}: counts as {event['weight']:g} rows, not {event['claimed']:g} ({why})"
    if kind == "benched":
        return f"  {name}: left out of round {event['round']} because it failed before"
    if kind == "round" and not event["round"]:
        told = event.get("scored", True)
        return "all sites have scored the untuned model" if told else "the run has begun"
    if kind == "round":
        return f"round {event['round']} done, {event['seconds']:.1f} s"
    if kind == "submitted":
        verb = "resumed" if event["resume"] else "submitted"
        return f"job {event['job']} {verb}, for {', '.join(event['sites'])}"
    if kind == "again":
        why = "the job ended early; " if event["early"] else ""
        return f"{why}continuing after round {event['round']} with all connected sites"
    return f"job {event['status']}" if kind == "ended" else ""

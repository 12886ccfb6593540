"""``fedvlm deploy`` and ``fedvlm site``: runs over real machines."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from fedvlm.cli.options import QuietOption, Words, parse
from fedvlm.errors import ConfigError, FedVLMError

HOME = "federation"
STAYED = "personal adapters and all answers are at the sites, in STATE/runs/"

deploy = typer.Typer(no_args_is_help=True, help="Run over real machines, by NVFlare.")
site = typer.Typer(no_args_is_help=True, help="Take part with one site's rows.")

Folder = Annotated[
    str, typer.Option("--federation", "-f", metavar="DIR", help="what 'deploy init' has written")
]


@deploy.callback()
@site.callback()
def _installed() -> None:
    if find_spec("nvflare") is None:
        raise FedVLMError("this needs NVFlare: pip install 'fedvlm[deploy]'")


@deploy.command()
def init(
    project: Annotated[str, typer.Argument(metavar="PROJECT.yml", help="server, and sites")],
    to: Annotated[str, typer.Option(metavar="DIR", help="where certificates and kits go")] = HOME,
) -> None:
    """Make certificates, and a start-up kit for every site."""
    from fedvlm.deploy.nvflare.project import provision, read_project

    kits = provision(read_project(project), Path(to))
    for name, path in kits.items():
        if path.suffix == ".zip":
            typer.echo(f"{name}: give {path} to this site, over a channel that you trust")
    typer.echo(f"{to}/ca has all private keys: keep it here and off every other machine")
    typer.echo(f"next: fedvlm deploy server -f {to}")


@deploy.command()
def server(folder: Folder = HOME) -> None:
    """Run the server of a federation, in the foreground."""
    from fedvlm.deploy.nvflare.processes import serve

    serve(Path(folder), typer.echo)


@deploy.command()
def run(
    words: Words = None,
    resume: Annotated[
        str | None, typer.Option(metavar="DIR", help="go on with the unfinished run in DIR")
    ] = None,
    folder: Folder = HOME,
    min_sites: Annotated[int, typer.Option(help="fewest sites of a round")] = 1,
    wait: Annotated[float, typer.Option(help="seconds for all sites to connect")] = 60.0,
    round_deadline: Annotated[int, typer.Option(help="seconds a site has to train")] = 3600,
    quiet: QuietOption = False,
) -> None:
    """Fine-tune over the connected sites, and follow it. Run this on the server's machine."""
    from fedvlm import config as configs
    from fedvlm.cli.tables import print_run
    from fedvlm.deploy.nvflare import federation as runs
    from fedvlm.deploy.remote import Limits

    if resume and words:
        raise ConfigError(["--resume takes the run's own configuration; leave out the others"])
    source, overrides = parse(words)
    settings = runs.saved(resume) if resume else configs.load(source, *overrides)
    federation = runs.Federation(folder)
    if not 1 <= min_sites <= len(federation.project.sites):
        raise ConfigError(
            [f"--min-sites {min_sites}: the federation has {len(federation.project.sites)} sites"]
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
            f"\nno longer followed; the run goes on. End it with: fedvlm deploy abort -f {folder}",
            err=True,
        )
        sys.exit(130)
    print_run(results)
    typer.echo(STAYED)


@deploy.command()
def status(folder: Folder = HOME) -> None:
    """Say which sites are connected, and what runs."""
    from fedvlm.deploy.nvflare.federation import Federation

    federation = Federation(folder)
    found = federation.status()
    for name in federation.project.sites:
        typer.echo(f"{name:<24} {'connected' if name in found['sites'] else 'not connected'}")
    for job in found["jobs"]:
        typer.echo(f"job {job['job_id']}  {job.get('status')}")
    if not found["jobs"]:
        typer.echo("no job is under way")


@deploy.command()
def abort(folder: Folder = HOME) -> None:
    """End what runs; finished rounds are kept."""
    from fedvlm.deploy.nvflare.federation import Federation

    ended = Federation(folder).abort()
    typer.echo(f"ended: {', '.join(ended)}" if ended else "no job is under way")


@deploy.command()
def readmit(folder: Folder = HOME) -> None:
    """Let sites that were away take part again, from the next round on."""
    from fedvlm.deploy.nvflare.federation import Federation

    found = Federation(folder).readmit()
    told = "after this round, the 'fedvlm deploy run' that follows goes on with all connected sites"
    typer.echo(told if found else "no job is under way")


@deploy.command()
def demo(
    to: Annotated[str, typer.Option(metavar="DIR", help="where everything goes")] = "runs/deploy",
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """See it work on this machine: a server and three sites, real processes, mutual TLS."""
    from fedvlm.cli.tables import print_run
    from fedvlm.deploy.nvflare.demo import demo as show

    tell = (lambda event: None) if quiet else Shown().tell
    print_run(show(Path(to), list(words or []), tell))
    typer.echo(STAYED)


@site.command()
def start(
    kit: Annotated[str, typer.Argument(metavar="KIT.zip", help="this site's start-up kit")],
    data: Annotated[str, typer.Option(help="its rows: parquet, JSONL, folder")],
    state: Annotated[str, typer.Option(metavar="DIR", help="personal state, models and logs")],
    policy: Annotated[
        str | None, typer.Option(metavar="FILE", help="what a run may ask of this site")
    ] = None,
    systemd: Annotated[
        bool, typer.Option("--systemd", help="print a systemd unit, and stop")
    ] = False,
) -> None:
    """Take part with this site's rows, in the foreground, until it is stopped."""
    from fedvlm.deploy.nvflare.processes import start_site, systemd_unit

    if systemd:
        typer.echo(systemd_unit(kit, data, state, policy), nl=False)
        return
    start_site(kit, data, Path(state), policy, typer.echo)


class Shown:
    """Events as lines for a person."""

    def tell(self, event: dict[str, Any]) -> None:
        text = line(event)
        if text:
            typer.echo(plain(text))


def plain(text: str) -> str:
    """Text without what would steer a terminal: part of it is a site's own words."""
    whole = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return whole.replace("\n", "\n    ")


def line(event: dict[str, Any]) -> str:
    """An event as a person reads it; empty for those that say nothing."""
    kind, name = event["event"], event.get("site")
    if kind == "connected":
        return f"  {name}: connected"
    if kind == "opened":
        rows = event.get("rows")
        told = f"{rows['train']} train, {rows['val']} val, {rows['test']} test rows" if rows else ""
        return f"  {name}: ready, {told or 'rows not told'}"
    if kind == "trained":
        return (
            f"  {name}: round {event['round']}, loss {event['loss']:.3f}, "
            f"{event['bytes_up'] / 1000:.1f} kB up, {event['seconds']:.1f} s"
        )
    if kind == "failed":
        return f"  {name}: FAILED in round {event['round']}: {event['why']}"
    if kind == "rejected":
        return f"  {name}: REJECTED in round {event['round']}: {event['why']}"
    if kind == "benched":
        return f"  {name}: left out of round {event['round']}, since it failed before"
    if kind == "round" and not event["round"]:
        return "all sites have scored the untuned model"
    if kind == "round":
        return f"round {event['round']} done, {event['seconds']:.1f} s"
    if kind == "submitted":
        verb = "resumed" if event["resume"] else "submitted"
        return f"job {event['job']} {verb}, for {', '.join(event['sites'])}"
    if kind == "again":
        why = "the job ended early; " if event["early"] else ""
        return f"{why}going on after round {event['round']} with all sites that are connected"
    return f"job {event['status']}" if kind == "ended" else ""

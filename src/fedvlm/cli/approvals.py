"""``fedvlm site requests | approve | refuse``: a person decides on runs.

Texts in a request come from a server, so they are printed without control characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedvlm.errors import shown, visible

if TYPE_CHECKING:
    from fedvlm.deploy.approval import Request

State = Annotated[str, typer.Option(metavar="DIR", help="the folder of 'site start --state'")]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="number of a request, its beginning, or a run's number")
]


def requests(
    state: State,
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="one request, with all settings", show_default=False),
    ] = None,
) -> None:
    """List the runs that wait for a decision.

    Each one shows what would be sent, and the settings that differ from the defaults.
    """
    from fedvlm.deploy.approval import Requests

    found = Requests(_folder(state))
    if run:
        _print(found.find(run), state, whole=True)
        return
    known = found.all()
    waiting = [request for request in known if request.decision == "waiting"]
    for request in waiting:
        _print(request, state, whole=False)
    for request in known:
        if request not in waiting:
            typer.echo(f"request {request.number}: {_decision(request)}")
    if not waiting:
        typer.echo("no request waits")


def approve(run: Run, state: State) -> None:
    """Let a run take place at this site.

    The approval is for its configuration, and for the first run number that opens with it.
    """
    from fedvlm.deploy.approval import decided

    found = decided(_folder(state), run, "approved")
    typer.echo(f"request {found.number} is approved: configuration {found.digest}")
    typer.echo("the operator gives the same command again: fedvlm deploy run ...")


def refuse(
    run: Run,
    state: State,
    because: Annotated[
        str, typer.Option(metavar="TEXT", help="the reason; the server gets it")
    ] = "",
) -> None:
    """Refuse a run at this site.

    A run that is under way continues until it is opened again: stop the site to end it now.
    """
    from fedvlm.deploy.approval import decided

    found = decided(_folder(state), run, "refused", because)
    typer.echo(f"request {found.number} is refused")


def _folder(state: str) -> Path:
    from fedvlm.errors import FedVLMError

    if not Path(state).is_dir():
        raise FedVLMError(f"--state {shown(state, 200)}: there is no such folder")
    return Path(state)


def _print(request: Request, state: str, whole: bool) -> None:
    for line in _lines(request, state, whole):
        typer.echo(visible(line))
    typer.echo()


def _lines(request: Request, state: str, whole: bool) -> Iterator[str]:
    yield f"request {request.number}: {_decision(request)}"
    yield f"  asked {request.asked}, as run {request.run}"
    signed = f"signed by {request.signed_by}" if request.signed_by else "signature not checked"
    yield f"  {signed}; configuration {request.digest}"
    if request.unknown:
        yield f"  what would be sent is not known: {shown(request.unknown, 600, quotes=False)}"
    else:
        yield "  would be sent to the server:"
        yield from (f"    - {shown(text, 1000, quotes=False)}" for text in request.sent)
        yield "  would stay at this site:"
        yield from (f"    - {shown(text, 1000, quotes=False)}" for text in request.stays)
        yield from (f"  {shown(text, 400, quotes=False)}" for text in request.privacy)
    yield "  all settings at this site:" if whole else "  settings that differ from the defaults:"
    yield from (f"    {line}" for line in _settings(request.here, whole))
    if request.decision == "waiting":
        if not whole:
            yield f"  all settings: fedvlm site requests {request.number} --state {state}"
        yield f"  accept: fedvlm site approve {request.number} --state {state}"
        yield f"  refuse: fedvlm site refuse {request.number} --state {state} --because TEXT"


def _decision(request: Request) -> str:
    if request.decision == "waiting":
        return "waits for a decision"
    because = f" ({shown(request.because, 300, quotes=False)})" if request.because else ""
    run = f", for run {request.run}" if request.bound else ""
    return f"{request.decision} {request.decided}{because}{run}"


def _settings(here: dict[str, Any], whole: bool) -> Iterator[str]:
    """The settings, one ``section.key: value`` a line."""
    from fedvlm import config as configs
    from fedvlm.errors import FedVLMError
    from fedvlm.settings.plain import dotted

    try:
        name = here["algorithm"]["name"]
        usual = dict(dotted(configs.load({"algorithm": {"name": name}}).model_dump()))
    except (FedVLMError, KeyError, TypeError):  # an algorithm with settings that are required
        usual = dict(dotted(configs.load().model_dump()))
    for key, value in dotted(here):
        if whole or key not in usual or usual[key] != value or key == "algorithm.name":
            yield f"{shown(key, 200, quotes=False)}: {shown(value, 400, quotes=False)}"

"""``fedvlm app``: a page on this machine to ask a run's models about pictures."""

from __future__ import annotations

import contextlib
import secrets
import socket
from typing import Annotated

import typer

from fedvlm.cli.options import SetOption
from fedvlm.errors import FedVLMError


def playground(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="the folder of a finished run")],
    host: Annotated[
        str, typer.Option(help="address to listen at; by default, only this machine reaches it")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port of the page; 0 takes a free one")] = 7860,
    password: Annotated[
        str | None,
        typer.Option(
            envvar="FEDVLM_APP_PASSWORD",
            show_default=False,
            help="the token of the page; default: a random one",
        ),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Open a page to ask a run's models about pictures, side by side.

    It needs pip install 'fedvlm[app]'. Ctrl-C ends it.
    """
    from fedvlm.app import server

    server.needs_gradio()
    if password is not None and not (len(password) >= LEAST and password.isalnum()):
        raise FedVLMError(f"--password needs at least {LEAST} letters and digits, and nothing else")
    from fedvlm.after.asked import Asked
    from fedvlm.after.opened import open_run

    run = open_run(folder, *set_ or ())
    with contextlib.closing(server.listen(host, port)) as listener:
        token = password or secrets.token_urlsafe(24)
        if not server.is_loopback(host):
            typer.echo(WARNING, err=True)
        typer.echo("loading the models", err=True)
        asked = Asked(run)

        def ready() -> None:
            name = socket.gethostname() if host in ("0.0.0.0", "::") else host
            name = f"[{name}]" if ":" in name else name
            number = listener.getsockname()[1]
            typer.echo(f"open http://{name}:{number}/?token={token}\nCtrl-C ends the page")

        with contextlib.suppress(KeyboardInterrupt):
            server.serve(asked, listener, token, ready)


LEAST = 12
WARNING = (
    "warning: other machines reach this page, and the connection is not encrypted. Everyone with "
    "the address below can ask the models and see the run's held-out rows"
)

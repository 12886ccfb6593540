"""``fedvlm push``: a run's adapters to the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fedvlm.cli.options import SetOption
from fedvlm.errors import counted

if TYPE_CHECKING:
    from fedvlm.after.push import Push


def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="the folder of a finished run")],
    repo: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="the repository; it is made if it is new")
    ],
    client: Annotated[
        list[str] | None,
        typer.Option(
            "--client",
            "-c",
            metavar="NAME",
            help="this client's model; may be repeated; default: all models",
        ),
    ] = None,
    global_: Annotated[bool, typer.Option("--global", help="the global model")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="everybody may read them; default: private")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="the branch; default: the main one")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Push adapters to the Hugging Face hub: one repository, a folder for each model.

    Only adapters and model cards go up. The token is that of HF_TOKEN or hf auth login.
    """
    from fedvlm.after.push import push_to_hub

    address = push_to_hub(
        folder,
        repo,
        *set_ or (),
        clients=tuple(client or ()),
        global_=global_,
        public=public,
        revision=revision,
        tell=print_push,
    )
    typer.echo(f"pushed: {address}")


def print_push(push: Push) -> None:
    """Prints what will go up, and where."""
    seen = "PUBLIC: everybody can read it" if push.public else "private"
    state = "new" if push.new else "existing"
    typer.echo(f"to {push.repo} ({state}, {seen}), branch {push.branch}, as {push.account}:")
    for path, size in push.files.items():
        typer.echo(f"  {path}  {size:,} bytes")
    typer.echo(f"{counted(len(push.files), 'file')}, {sum(push.files.values()):,} bytes in all")

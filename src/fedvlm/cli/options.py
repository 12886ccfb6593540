"""Arguments and options that several commands share."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from fedvlm.errors import FedVLMError

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [KEY=VALUE]...",
        help="a configuration file and settings such as train.rounds=20",
        show_default=False,
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="print only the final table")]
SystemdOption = Annotated[
    bool, typer.Option("--systemd", help="print a unit of systemd for this command, and exit")
]
USER = "fedvlm"
UserOption = Annotated[
    str, typer.Option(metavar="NAME", help="with --systemd: the user of the unit's processes")
]
CredentialOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="with --systemd: the private key, as 'systemd-creds encrypt' has written it",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="change a setting of the run, such as "
        "model.device=cpu or data.columns.answer=label; may be repeated",
    ),
]


def parse(words: list[str] | None) -> tuple[str | None, list[str]]:
    """Splits words into a configuration file and settings; a first word with ``=`` is a setting."""
    words = list(words or [])
    source = words.pop(0) if words and "=" not in words[0] else None
    return source, words


def needs_nvflare() -> None:
    """Refuses a command that needs NVFlare where it is not installed."""
    if find_spec("nvflare") is None:
        raise FedVLMError("this needs NVFlare: pip install 'fedvlm[deploy]'")

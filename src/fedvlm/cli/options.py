"""What several commands take on the command line."""

from __future__ import annotations

from typing import Annotated

import typer

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [KEY=VALUE]...",
        help="a configuration file, and settings such as train.rounds=20",
        show_default=False,
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="print only the final table")]


def parse(words: list[str] | None) -> tuple[str | None, list[str]]:
    """A configuration file, if the first word is none of the form key=value, and the settings."""
    words = list(words or [])
    source = words.pop(0) if words and "=" not in words[0] else None
    return source, words

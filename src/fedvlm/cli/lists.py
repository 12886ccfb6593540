"""``fedvlm algorithms`` and ``fedvlm config``: what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer

from fedvlm.errors import ConfigError


def algorithms(
    name: Annotated[str | None, typer.Argument(help="one algorithm, with its settings")] = None,
) -> None:
    """List the algorithms, or show one: what it sends and keeps, its paper, its settings."""
    from fedvlm.cli.algorithms import print_algorithm, print_algorithms

    if name is None:
        print_algorithms()
    else:
        print_algorithm(name)


def config(
    part: Annotated[
        str | None, typer.Argument(help="a section or a setting, such as train or train.lr")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON schema of a configuration file")
    ] = False,
) -> None:
    """List every setting with its type, default and meaning."""
    from fedvlm.cli import settings

    if schema and part is not None:
        raise ConfigError([f"--schema is of all settings; leave out '{part}'"])
    if schema:
        typer.echo(settings.schema())
    else:
        settings.print_settings(part)

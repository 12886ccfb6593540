"""The progress of a comparison: one bar per run on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedvlm.cli.live import describe
from fedvlm.rounds.comparison import Event
from fedvlm.settings.sections import Config


@contextlib.contextmanager
def board(runs: Mapping[str, Config], quiet: bool) -> Iterator[Callable[[Event], None] | None]:
    """Yields a function to call with (run, metrics line, seconds) after every round.

    Args:
        runs: name -> settings.
        quiet: show nothing.
    """
    config = next(iter(runs.values()))
    rounds = config.train.rounds
    if quiet:
        yield None
        return
    if not sys.stdout.isatty():

        def line(event: Event) -> None:
            name, metrics, _ = event
            if metrics["evaluation"]:
                print(f"{name}: {describe(metrics, config)}", flush=True)

        yield line
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bars:
        total = len(runs) * (rounds + 1)
        everything = bars.add_task("all", total=total, note="loading")
        tasks: dict[str, Any] = {}

        def update(event: Event) -> None:
            name, metrics, _ = event
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=rounds, note="")
            number = min(metrics["round"], rounds)
            bars.update(tasks[name], completed=number)
            if metrics["evaluation"]:
                bars.update(tasks[name], note=describe(metrics, config))
            bars.update(everything, advance=1, note="")

        yield update

"""The progress of a comparison: one bar per run on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedvlm.cli.bars import bars, named, noted
from fedvlm.cli.live import describe, means
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
    with bars() as shown:
        total = len(runs) * (rounds + 1)
        everything = shown.add_task("all runs", total=total, note="loading model and rows")
        tasks: dict[str, Any] = {}

        def update(event: Event) -> None:
            name, metrics, _ = event
            if name not in tasks:
                tasks[name] = shown.add_task(named(name), total=rounds, note="training")
            shown.update(tasks[name], completed=min(metrics["round"], rounds))
            if scores := means(metrics, config):
                text = ", ".join(f"{model} {mean:.0%}" for model, mean in scores.items())
                shown.update(tasks[name], note=noted(text))
            if metrics["round"] <= rounds:  # the end of a run may be a line of its own
                shown.update(everything, advance=1, note="")

        yield update

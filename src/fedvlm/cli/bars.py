"""Bars of progress whose lines fit a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from fedvlm.errors import brief

NAME, NOTE = 18, 28  # characters; the bar, the rounds and the times need 33


def bars(console: Any = None) -> Any:
    """Rich's progress: a name, a bar, the rounds, a note, the time so far and the time left.

    Every task needs the field ``note``, see :func:`noted`.

    Args:
        console: rich's console; None: standard output.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False, style="bold"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
    )


def named(text: str) -> str:
    """The name of a task; markup in it has no effect."""
    return brief(text, NAME)


def noted(text: str) -> str:
    """The note of a task."""
    return brief(text, NOTE)

"""What the command line says where a run cannot begin, has been stopped, or is finished."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import typer

from fedvlm import processes
from fedvlm.errors import FedVLMError

UNBEGUN = (
    "stopped before the run had begun; nothing was trained or kept. Start it again with the same "
    "command"
)


@contextlib.contextmanager
def interruptible(how: str, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Ctrl-C says how to go on.

    Args:
        how: the command that goes on.
        begun: whether there is something to go on with.
    """
    try:
        yield
    except KeyboardInterrupt:
        kept = f"stopped; finished work is kept. Resume with: {how}"
        if processes.rank() == 0:
            typer.echo(f"\n{kept if begun() else UNBEGUN}", err=True)
        sys.exit(130)


def taken(folder: str) -> str:
    """Why a run cannot begin in a folder; empty if it can."""
    from fedvlm.store.run import check_fresh

    try:
        check_fresh(folder)
    except FedVLMError as wrong:
        return str(wrong)
    return ""


def say_finished(folder: str) -> None:
    """Says that resuming a finished run trains nothing, and how to add rounds."""
    from fedvlm.store.run import is_done

    if is_done(folder) and processes.rank() == 0:
        typer.echo(
            f"the run in {folder} is finished: nothing is trained now. For more rounds: "
            f"fedvlm run --resume {folder} train.rounds=N"
        )

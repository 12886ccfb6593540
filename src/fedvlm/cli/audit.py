"""``fedvlm audit``: a lower bound of epsilon from the canaries of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fedvlm.cli.options import SetOption
from fedvlm.cli.report import reported

if TYPE_CHECKING:
    from fedvlm.after.audit import Audit


def audit(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="the folder of a finished run with canaries")
    ],
    set_: SetOption = None,
) -> None:
    """Measure how much a run's models reveal of its canaries.

    The run needs privacy.canaries=N. Exits with 1 if a bound is above the run's guarantee.
    """
    from fedvlm.after.audit import audit as measured

    found = measured(folder, *set_ or ())
    print_audit(found)
    reported(found.folder)
    if found.broken:
        raise typer.Exit(1)


def print_audit(found: Audit) -> None:
    """Prints a row for each view and attack, and how to read the numbers."""
    from rich.table import Table

    from fedvlm.after.audit import READING, verdict
    from fedvlm.cli.tables import console_for_tables

    console = console_for_tables()
    table = Table(title="lower bounds of epsilon at 95 %, from one run")
    heads = (
        "view",
        "attack",
        "canaries",
        "guesses",
        "right",
        "epsilon >=",
        "AUC",
        "TPR at 1 % FPR",
    )
    for head in heads:
        table.add_column(head, justify="left" if head in ("view", "attack") else "right")
    for view, attacks in found.views.items():
        for attack, one in attacks.items():
            numbers = (one.canaries, one.best.guesses, one.best.right)
            bound, auc, tpr = f"{one.best.epsilon:.2f}", f"{one.auc:.3f}", f"{100 * one.tpr:.1f} %"
            table.add_row(view, attack, *map(str, numbers), bound, auc, tpr)
        table.add_section()
    console.print(table)
    lines = [*READING, *verdict(found), f"written to {found.folder / 'audit.json'}"]
    console.print("\n".join(lines), highlight=False, markup=False)

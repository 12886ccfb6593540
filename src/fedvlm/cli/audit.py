"""``fedvlm audit``: a lower bound of epsilon from the canaries of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedvlm.after.audit import Audit

ABOUT = {
    "upload": "what a curious server sees of a client",
    "global": "the shared model",
    "personal": "what a client keeps",
}


def audit(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="the folder of a finished run with canaries")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="change a setting of the run, such as model.device=cpu; may be repeated",
        ),
    ] = None,
) -> None:
    """Measure how much a run's models reveal of its canaries.

    The run needs privacy.canaries=N. Exits with 1 if a bound is above the run's epsilon.
    """
    from fedvlm.after.audit import audit as measured

    found = measured(folder, *set_ or ())
    print_audit(found)
    if found.broken:
        raise typer.Exit(1)


def print_audit(found: Audit) -> None:
    """Prints a row for each view, and how to read the numbers."""
    from rich.table import Table

    from fedvlm.cli.tables import console_for_tables

    console = console_for_tables()
    table = Table(title="lower bounds of epsilon at 95 %, from one run")
    for head in ("view", "canaries", "guesses", "right", "epsilon >=", "AUC", "TPR at 1 % FPR"):
        table.add_column(head, justify="left" if head == "view" else "right")
    for view, one in found.views.items():
        numbers = (str(one.canaries), str(one.best.guesses), str(one.best.right))
        shares = (f"{one.auc:.3f}", f"{100 * one.tpr:.1f} %")
        table.add_row(view, *numbers, f"{one.best.epsilon:.2f}", *shares)
    console.print(table)
    lines = [f"{view}: {ABOUT[view]}" for view in found.views]
    lines += ["A low bound is no proof of privacy: a better attack may find more", *verdict(found)]
    console.print("\n".join(lines), highlight=False, markup=False)
    console.print(f"written to {found.folder / 'audit.json'}", highlight=False, markup=False)


def verdict(found: Audit) -> list[str]:
    """The sentences that compare the bounds with the run's epsilon."""
    if found.epsilon is None:
        return ["The run claims no differential privacy (privacy.unit)"]
    claim = f"the run's epsilon, {found.epsilon:g} (privacy.unit={found.unit})"
    if not found.broken:
        return [f"No bound is above {claim}"]
    return [
        f"The guarantee is broken: the bound of the {view} model, "
        f"{found.views[view].best.epsilon:.2f}, is above {claim}"
        for view in found.broken
    ]

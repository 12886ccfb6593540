"""The table of algorithms, and one algorithm with its settings, as a person reads them."""

from __future__ import annotations

import difflib

from rich.table import Table

from fedvlm.algorithms.table import ALIASES, TABLE, find, names
from fedvlm.cli.settings import rows_of
from fedvlm.cli.tables import console_for_tables
from fedvlm.errors import ConfigError, FedVLMError


def print_algorithms() -> None:
    """A row for each algorithm; those of installed packages last."""
    out = Table()
    for head in ("algorithm", "a client sends", "and keeps", "source"):
        out.add_column(head)
    for name in names():
        if name not in TABLE and name == names()[len(TABLE)]:
            out.add_section()
        try:
            entry = find(name)
            out.add_row(name, entry.sends, entry.keeps, entry.source)
        except FedVLMError as error:  # one broken package hides no other
            out.add_row(name, "", "", f"error: {error}")
    console = console_for_tables()
    console.print(out)
    known = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    console.print(f"also understood: {known} · settings: fedvlm algorithms NAME", highlight=False)


def print_algorithm(name: str) -> None:
    """One algorithm and its settings.

    Raises:
        ConfigError: there is no such algorithm.
    """
    try:
        entry = find(name)
    except KeyError:
        close = difflib.get_close_matches(name, [*names(), *ALIASES], n=1)
        hint = f": did you mean '{close[0]}'?" if close else ""
        raise ConfigError(
            [f"there is no algorithm '{name}'{hint}; there are {', '.join(names())}"]
        ) from None
    console = console_for_tables()
    title = f"{name}, which is {ALIASES[name]}" if name in ALIASES else name
    facts = {"sends": entry.sends, "keeps": entry.keeps, "source": entry.source}
    lines = [title, *(f"  {what:<7} {text}" for what, text in facts.items())]
    console.print("\n".join(lines), highlight=False, markup=False)
    out = Table("setting", "type", "default", "meaning")
    for row in rows_of(entry.settings, "algorithm."):
        if row[0] != "algorithm.name":
            out.add_row(*row)
    if entry.ranks:
        out.add_row(
            "lora.ranks", "mapping", "", "pattern of client names -> rank; empty: lora.rank"
        )
    if entry.spare:
        out.add_row("lora.spare", "int", "", "ranks that are not trained; empty: 4 times lora.rank")
    console.print(out) if out.row_count else console.print("  no settings of its own")

"""The raw results by cell and algorithm, and the algorithms that may be compared.

Two runs may be compared where their clients took as many optimizer steps together. The tables show
the score of any other run without a difference to it, and without a rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from _personalization.bootstrap import Estimate, difference
from _personalization.cells import MAIN, REFERENCES, Cell, full

Row = Mapping[str, Any]
Pair = tuple[int, str]  # seed, client
Scores = dict[Cell, dict[str, dict[Pair, float]]]
Values = dict[Cell, dict[str, dict[int, float]]]

DEFAULT = "auto"
PERSONAL = ("personal", "after")
UNEQUAL = "unequal steps"
_SYNTHETIC = {cell.regime for cell in full()} - {"photos"}


def scores(rows: Iterable[Row], metric: str | None = None) -> Scores:
    """Cell -> algorithm -> (seed, client) -> score of the client's personal model.

    Args:
        rows: raw results.
        metric: a metric of every cell; None: the metric of each cell.
    """
    found: Scores = {}
    for row in rows:
        if (row["model"], row["when"]) == PERSONAL:
            by_pair = found.setdefault(place(row), {}).setdefault(row["algorithm"], {})
            for client, own in row["scores"].items():
                by_pair[row["seed"], client] = own[metric or row["metric"]]
    return found


def values(rows: Iterable[Row], column: str, of: tuple[str, str] = PERSONAL) -> Values:
    """Cell -> algorithm -> seed -> value of a column, for one model at one time."""
    found: Values = {}
    for row in rows:
        if (row["model"], row["when"]) == of and row[column] is not None:
            by_seed = found.setdefault(place(row), {}).setdefault(row["algorithm"], {})
            by_seed[row["seed"]] = row[column]
    return found


def place(row: Row) -> Cell:
    """The cell of a row."""
    return Cell(row["regime"], row["strength"], row["rows_per_client"])


def is_real(cell: Cell) -> bool:
    """Whether the rows of a cell are photographs or data of the user's, and no drawn scenes."""
    return cell.regime not in _SYNTHETIC


def parts(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of synthetic cells, and the rows of real cells."""
    real = [row for row in rows if is_real(place(row))]
    return [row for row in rows if not is_real(place(row))], real


def main(rows: Sequence[Row]) -> list[Row]:
    """The rows of the algorithms of the main part and of the references.

    All rows where no algorithm of the main part was run.
    """
    if not any(row["algorithm"] in MAIN["algorithms"] for row in rows):
        return list(rows)
    return [row for row in rows if row["algorithm"] in (*MAIN["algorithms"], *REFERENCES)]


def unequal(rows: Iterable[Row]) -> dict[Cell, set[str]]:
    """Cell -> the algorithms with another number of steps than the default algorithm.

    Without the default algorithm, the most frequent number of the cell counts.
    """
    found = {}
    for cell, algorithms in values(rows, "steps").items():
        counts = Counter(n for own in algorithms.values() for n in own.values())
        usual = algorithms.get(DEFAULT, {})
        most = counts.most_common(1)[0][0]
        found[cell] = {
            name
            for name, own in algorithms.items()
            if any(steps != usual.get(seed, most) for seed, steps in own.items())
        }
    return found


def ranked(rows: Sequence[Row]) -> Scores:
    """The scores of the algorithms that are ranked: no references, and none of unequal steps."""
    odd = unequal(rows)
    return {
        cell: {a: own for a, own in found.items() if a not in REFERENCES and a not in odd[cell]}
        for cell, found in scores(rows).items()
    }


def gap(
    found: Mapping[str, Mapping[Pair, float]], odd: Iterable[str], name: str, than: str = DEFAULT
) -> Estimate | str | None:
    """The lead of an algorithm over another in a cell.

    Args:
        found: algorithm -> scores by pair, in the cell.
        odd: the algorithms of unequal steps in the cell.
        name: the algorithm.
        than: the other algorithm.

    Returns:
        The lead; a text for runs of unequal steps; None without common pairs.
    """
    if not found.get(name, {}).keys() & found.get(than, {}).keys():
        return None
    if {name, than} & set(odd):
        return UNEQUAL
    return difference(found[name], found[than])

"""The tables of the personalization benchmark in Markdown, from its raw results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from _personalization import ranks as ranking
from _personalization.cells import MAIN, REFERENCES, Cell
from fedvlm.metrics import mean, standard_error

Row = Mapping[str, Any]
Scores = dict[Cell, dict[str, dict[int, float]]]
PERSONAL = ("personal", "after")
ENOUGH = 3  # seeds of a judged cell: one seed has no spread, and two give a poor estimate


def scores(rows: Iterable[Row], column: str = "mean", of: tuple[str, str] = PERSONAL) -> Scores:
    """Cell -> algorithm -> seed -> value of a column, for one model at one time."""
    found: Scores = {}
    for row in rows:
        if (row["model"], row["when"]) == of and row[column] is not None:
            by_seed = found.setdefault(_place(row), {}).setdefault(row["algorithm"], {})
            by_seed[row["seed"]] = row[column]
    return found


def ranked(found: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """The ranked algorithms: all algorithms that do not pool rows."""
    names = dict.fromkeys(name for cell in found.values() for name in cell)
    return [name for name in names if name not in REFERENCES]


def main(rows: Sequence[Row]) -> list[Row]:
    """The rows of the algorithms of the main part; all rows where no such algorithm was run."""
    return [row for row in rows if row["algorithm"] in MAIN["algorithms"]] or list(rows)


def judged(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of cells with enough seeds, and the rows of the other cells.

    Where no cell has enough seeds, all cells are judged.
    """
    number = _seeds(rows)
    enough = [row for row in rows if number[_place(row)] >= ENOUGH]
    few = [row for row in rows if number[_place(row)] < ENOUGH]
    return (enough, few) if enough else (few, [])


def seeds(rows: Sequence[Row]) -> str:
    """The number of seeds of the cells, as text."""
    number = _seeds(rows).values()
    least, most = min(number), max(number)
    range_ = f"{least} to {most}" if least < most else f"{most}"
    return f"{range_} seed{'s' if most > 1 else ''}"


def _seeds(rows: Sequence[Row]) -> dict[Cell, int]:
    found: dict[Cell, set[int]] = {}
    for row in rows:
        found.setdefault(_place(row), set()).add(row["seed"])
    return {cell: len(those) for cell, those in found.items()}


def _place(row: Row) -> Cell:
    return Cell(row["regime"], row["strength"], row["rows_per_client"])


def overview(rows: Sequence[Row]) -> str:
    """Average ranks, and cells won or tied, over the cells with all algorithms."""
    found = scores(rows)
    placed = ranking.overview(found, scores(rows, "worst10"), ranked(found))
    head = ("algorithm", "average rank", "won or tied", "mean", "worst 10 %")
    body = [
        (
            f"`{row.algorithm}`",
            f"{row.rank:.2f}",
            f"{row.won} of {row.cells}",
            _percent(row.mean),
            _percent(row.worst10),
        )
        for row in placed
    ]
    return table(head, body) if body else "No cell has all algorithms yet."


def pays(rows: Sequence[Row]) -> str:
    """The cells in which collaboration pays, and the cells in which personalization pays."""
    found = scores(rows)
    body = []
    for cell, all_scores in found.items():
        some = {a: s for a, s in all_scores.items() if a not in REFERENCES}
        both = [ranking.clearly_behind(some, name) for name in ("local", "lora")]
        ends = [_mean(some.get(name)) for name in ("local", "lora")]
        top = ranking.best(some)
        seeds = len(some[top])
        body.append(
            (
                cell.name,
                str(seeds),
                *ends,
                f"{_mean(some[top])} (`{top}`)",
                *("yes" if yes else "no" for yes in both),
            )
        )
    head = ("cell", "seeds", "`local`", "`lora`", "best", "collaboration", "personalization")
    return table(head, body)


def regimes(rows: Sequence[Row]) -> str:
    """A table a regime, with a row an algorithm and a column a cell."""
    found = scores(rows)
    parts = []
    for regime in dict.fromkeys(cell.regime for cell in found):
        cells = [cell for cell in found if cell.regime == regime]
        names = dict.fromkeys(name for cell in cells for name in found[cell])
        won = {c: _winners(found[c]) for c in cells}
        body = [
            (f"`{name}`", *(_cell(found[c].get(name), name in won[c]) for c in cells))
            for name in names
        ]
        untuned = scores(rows, of=("untuned", "start"))
        body.append(("(untuned)", *(_untuned(untuned.get(c, {})) for c in cells)))
        parts.append(f"### {regime}\n\n{table(('algorithm', *map(_title, cells)), body)}")
    return "\n\n".join(parts)


def everyone(rows: Sequence[Row]) -> str:
    """All algorithms, in the cells with more than the main algorithms."""
    few = {row["algorithm"] for row in main(rows)}
    found = {c: own for c, own in scores(rows).items() if own.keys() - few}
    if not found:
        return "Only the algorithms above were run yet."
    shared = {c: frozenset.intersection(*map(frozenset, own.values())) for c, own in found.items()}
    compared = {
        c: {a: {s: v for s, v in seeds.items() if s in shared[c]} for a, seeds in own.items()}
        for c, own in found.items()
    }
    places = {
        c: ranking.ranks({a: seeds for a, seeds in own.items() if a not in REFERENCES})
        for c, own in compared.items()
    }
    names = dict.fromkeys(name for own in compared.values() for name in own)
    ranks = {n: [place[n] for place in places.values() if n in place] for n in names}
    order = sorted(names, key=lambda n: (-len(ranks[n]), mean(ranks[n]) if ranks[n] else 0.0))
    won = {c: _winners(own) for c, own in compared.items()}
    body = [
        (
            f"`{n}`",
            f"{mean(ranks[n]):.1f}" if len(ranks[n]) == len(compared) else "",
            *(_cell(own.get(n), n in won[c]) for c, own in compared.items()),
        )
        for n in order
    ]
    seeds = [f"{c.name}, seeds {', '.join(map(str, sorted(shared[c])))}" for c in compared]
    return table(("algorithm", "average rank", *seeds), body)


def details(rows: Sequence[Row]) -> str:
    """A table a cell with all measurements."""
    kinds = {
        "personal": PERSONAL,
        "before": ("personal", "before"),
        "global": ("global", "after"),
        "global, before": ("global", "before"),
    }
    values = {name: scores(rows, of=of) for name, of in kinds.items()}
    worst, sent = scores(rows, "worst10"), scores(rows, "bytes_up")
    rounds = scores(rows, "rounds_to_90")
    parts = []
    for cell, algorithms in values["personal"].items():
        order = sorted(algorithms, key=lambda name: -mean(algorithms[name].values()))
        body = []
        for name in order:
            line = [_score(values[kind].get(cell, {}).get(name)) for kind in kinds]
            line.append(_score(worst[cell].get(name)))
            reached = rounds.get(cell, {}).get(name, {})
            line.append(f"{mean(reached.values()):.1f}" if reached else "")
            line.append(f"{mean(sent[cell][name].values()) / 1e6:.1f}")
            body.append((f"`{name}`", str(len(algorithms[name])), *line))
        head = ("algorithm", "seeds", *kinds, "worst 10 %", "rounds to 90 %", "MB up")
        parts.append(f"### {cell.name}\n\n{table(head, body)}")
    return "\n\n".join(parts)


def rates(chosen: Mapping[tuple[str, str], float]) -> str:
    """The learning rate of each algorithm, with a column a kind of regime."""
    kinds = list(dict.fromkeys(kind for kind, _ in chosen))
    names = dict.fromkeys(name for _, name in chosen)
    body = [
        (f"`{name}`", *(f"{chosen[k, name]:g}" if (k, name) in chosen else "" for k in kinds))
        for name in names
    ]
    return table(("algorithm", *kinds), body)


def _winners(cell: Mapping[str, Mapping[int, float]]) -> set[str]:
    some = {name: own for name, own in cell.items() if name not in REFERENCES}
    return ranking.winners(some) if some else set()


def _title(cell: Cell) -> str:
    strength = "" if cell.strength is None else f"{cell.strength:g}, "
    return f"{strength}{cell.rows} rows"


def _cell(seeds: Mapping[int, float] | None, won: bool) -> str:
    text = _score(seeds)
    return f"**{text}**" if won and text else text


def _untuned(algorithms: Mapping[str, Mapping[int, float]]) -> str:
    """Score of the untuned model. It is the same for all but references that see client names."""
    federated = [own for name, own in algorithms.items() if name not in REFERENCES]
    return _score({seed: value for own in federated for seed, value in own.items()})


def _score(seeds: Mapping[int, float] | None) -> str:
    if not seeds:
        return ""
    error = standard_error(list(seeds.values()))
    return _mean(seeds) + (f" ± {100 * error:.1f}" if len(seeds) > 1 else "")


def _mean(seeds: Mapping[int, float] | None) -> str:
    return _percent(mean(seeds.values())) if seeds else ""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

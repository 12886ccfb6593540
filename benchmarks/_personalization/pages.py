"""The tables of the personalization benchmark in Markdown, from its raw results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from _personalization import ranks as ranking
from _personalization.bootstrap import LEAST, Estimate
from _personalization.cells import REFERENCES, Cell
from _personalization.scores import (
    DEFAULT,
    Row,
    Values,
    gap,
    main,
    ranked,
    scores,
    unequal,
    values,
)
from fedvlm.metrics import mean

COSTS = {"steps": "steps", "passes": "passes", "bytes_up": "MB up", "seconds": "seconds"}
"""Column of the raw results -> head in the tables."""

READING = f"""A pair is a client in a run (seed, client). A score is the mean over the pairs. Round
brackets hold the difference to `{DEFAULT}` in points, with its 95 % interval by a paired bootstrap
over the pairs. A lead is claimed where this interval lies above zero, with {LEAST} pairs or more.
Bold: the best of the cell, or within one standard error of it. Rows are scored test
rows of all pairs. Steps are the optimizer steps of all clients in a run. An algorithm with another
number of steps has a score, and neither a difference nor a rank. Passes are the rows that went
forward through the model in training and in choices. Seconds are the wall time of a run beside
other runs on the same machine."""


PAYS = """Collaboration: the lead of the best algorithm over `local`. Personalization: its lead over
`lora`. The best algorithm is chosen by the same scores, so its lead is a little too large."""


def seeds(rows: Sequence[Row]) -> str:
    """The number of seeds of the cells, as text."""
    found: dict[tuple[Any, ...], set[int]] = {}
    for row in rows:
        cell = row["regime"], row["strength"], row["rows_per_client"]
        found.setdefault(cell, set()).add(row["seed"])
    least, most = min(map(len, found.values())), max(map(len, found.values()))
    range_ = f"{least} to {most}" if least < most else f"{most}"
    return f"{range_} seed{'s' if most > 1 else ''}"


def overview(rows: Sequence[Row]) -> str:
    """Average ranks over the cells with the same algorithms, and costs; a row an algorithm."""
    found = ranked(rows)
    names, cells = ranking.block(found)
    worst = values(rows, "worst10")
    costs = {column: values(rows, column) for column in COSTS}
    body = [
        (
            f"`{row.algorithm}`",
            f"{row.rank:.2f}",
            f"{row.won} of {len(cells)}",
            percent(row.mean),
            percent(mean(mean(worst[c][row.algorithm].values()) for c in cells)),
            *(_cost(column, costs[column], cells, row.algorithm) for column in COSTS),
        )
        for row in ranking.overview({c: found[c] for c in cells}, names)
    ]
    head = ("algorithm", "average rank", "won or tied", "mean", "worst 10 %", *COSTS.values())
    left = sorted(
        {f"`{name}`" for own in found.values() for name in own} - {f"`{n}`" for n in names}
    )
    odd = sorted({f"`{n}`" for own in unequal(rows).values() for n in own if n not in REFERENCES})
    notes = [
        f"Cells: {', '.join(cell.name for cell in cells)}.",
        f"Not in all of these cells: {', '.join(left)}." if left else "",
        f"Not ranked in some cells, because of unequal steps: {', '.join(odd)}." if odd else "",
    ]
    return f"{table(head, body)}\n\n{' '.join(filter(None, notes))}"


def _cost(column: str, found: Values, cells: Iterable[Cell], name: str) -> str:
    some = [mean(found[c][name].values()) for c in cells if name in found.get(c, {})]
    return cost(column, mean(some)) if some else ""


def cost(column: str, value: float) -> str:
    """A value of one of the columns :data:`COSTS` for people; bytes become megabytes."""
    return f"{value / 1e6:.1f}" if column == "bytes_up" else f"{value:.0f}"


def matrix(rows: Sequence[Row]) -> str:
    """Cells by algorithms: score, and difference to the default algorithm with its interval."""
    found, odd = scores(rows), unequal(rows)
    won = {c: ranking.winners(own) for c, own in ranked(rows).items()}
    names = sorted(
        dict.fromkeys(name for own in found.values() for name in own),
        key=lambda name: (name in REFERENCES, name != DEFAULT),
    )
    untuned = values(rows, "mean", ("untuned", "start"))
    steps, held = values(rows, "steps"), values(rows, "rows")
    body = []
    for cell, own in found.items():
        most = max(own, key=lambda name: (name not in odd[cell], len(own[name])))
        body.append(
            (
                cell.name,
                f"{len(own[most])} ({sum(held[cell][most].values())})",
                cost("steps", mean(steps[cell][most].values())),
                *(entry(own, odd[cell], name, name in won[cell]) for name in names),
                _untuned(untuned.get(cell, {})),
            )
        )
    head = ("cell", "pairs (rows)", "steps", *(f"`{name}`" for name in names), "untuned")
    return table(head, body)


def entry(own: Mapping[str, Any], odd: Iterable[str], name: str, won: bool) -> str:
    """The score of an algorithm in a cell, and its difference to the default algorithm."""
    if name not in own:
        return ""
    score = percent(mean(own[name].values()))
    text = f"**{score}**" if won else score
    return text if name == DEFAULT else f"{text} {_gap(gap(own, odd, name))}".strip()


def _gap(lead: Estimate | str | None) -> str:
    return f"({shown(lead) if isinstance(lead, Estimate) else lead})" if lead else ""


def shown(lead: Estimate) -> str:
    """A difference in points, with its interval."""
    return f"{100 * lead.value:+.1f} [{100 * lead.low:+.1f}, {100 * lead.high:+.1f}]"


def pays(rows: Sequence[Row]) -> str:
    """The cells in which collaboration pays, and the cells in which personalization pays.

    The answer is `yes` where the interval of the lead of the best algorithm lies above zero.
    """
    body = []
    for cell, own in ranked(rows).items():
        if not own:
            continue
        top = ranking.best(own)
        leads = [gap(own, (), top, than) for than in ("local", "lora")]
        body.append(
            (
                cell.name,
                str(len(own[top])),
                *(_mean(own.get(name)) for name in ("local", "lora")),
                f"{_mean(own[top])} (`{top}`)",
                *(_paid(lead) for lead in leads),
            )
        )
    head = ("cell", "pairs", "`local`", "`lora`", "best", "collaboration", "personalization")
    return table(head, body)


def _paid(lead: Estimate | str | None) -> str:
    if not isinstance(lead, Estimate):
        return ""
    if lead.value == 0:
        return "no"
    return f"{'yes' if lead.above() else 'not shown'} {shown(lead)}"


def everyone(rows: Sequence[Row]) -> str:
    """All algorithms, in the cells with more than the main algorithms, over their common pairs."""
    few = {row["algorithm"] for row in main(rows)}
    found = {c: ranking.common(own) for c, own in scores(rows).items() if own.keys() - few}
    if not found:
        return "Only the algorithms above were run yet."
    odd, allowed = unequal(rows), ranked(rows)
    places = {
        c: ranking.ranks({a: pairs for a, pairs in own.items() if a in allowed[c]})
        for c, own in found.items()
    }
    won = {
        c: ranking.winners({a: pairs for a, pairs in own.items() if a in allowed[c]})
        for c, own in found.items()
    }
    names = dict.fromkeys(name for own in found.values() for name in own)
    ranks = {n: [place[n] for place in places.values() if n in place] for n in names}
    order = sorted(names, key=lambda n: (-len(ranks[n]), mean(ranks[n]) if ranks[n] else 0.0))
    body = [
        (
            f"`{n}`",
            f"{mean(ranks[n]):.1f}" if len(ranks[n]) == len(found) else "",
            *(entry(own, odd[c], n, n in won[c]) for c, own in found.items()),
        )
        for n in order
    ]
    heads = [f"{c.name}, {len(next(iter(own.values())))} pairs" for c, own in found.items()]
    return table(("algorithm", "average rank", *heads), body)


def by_site(rows: Sequence[Row], cells: Iterable[Cell]) -> str:
    """A table a cell: algorithms by sites, token F1 and exact match of the personal models."""
    found = {m: scores(rows, m) for m in ("token_f1", "exact_match")}
    parts = []
    for cell in cells:
        first = found["token_f1"][cell]
        sites = sorted({site for own in first.values() for _, site in own})
        body = []
        for name in first:
            means = {m: _by_site(found[m][cell][name]) for m in found}
            body.append(
                (
                    f"`{name}`",
                    *(f"{_mean(means['token_f1'])} ({_mean(means['exact_match'])})",),
                    *(
                        f"{percent(means['token_f1'][s])} ({percent(means['exact_match'][s])})"
                        for s in sites
                    ),
                )
            )
        parts.append(
            f"### {cell.name}, by site: token F1 (exact match)\n\n"
            f"{table(('algorithm', 'all sites', *sites), body)}"
        )
    return "\n\n".join(parts)


def _by_site(own: Mapping[tuple[int, str], float]) -> dict[str, float]:
    sites: dict[str, list[float]] = {}
    for (_, site), score in own.items():
        sites.setdefault(site, []).append(score)
    return {site: mean(all_) for site, all_ in sites.items()}


def details(rows: Sequence[Row]) -> str:
    """A table a cell with all measurements."""
    kinds = {
        "before": ("personal", "before"),
        "global": ("global", "after"),
        "global, before": ("global", "before"),
    }
    others = {name: values(rows, "mean", of) for name, of in kinds.items()}
    worst, rounds = values(rows, "worst10"), values(rows, "rounds_to_90")
    costs = {column: values(rows, column) for column in COSTS}
    odd, parts = unequal(rows), []
    for cell, own in scores(rows).items():
        body = []
        for name in sorted(own, key=lambda name: -mean(own[name].values())):
            line = [_mean(others[kind].get(cell, {}).get(name)) for kind in kinds]
            line.append(_mean(worst[cell].get(name)))
            reached = rounds.get(cell, {}).get(name, {})
            line.append(f"{mean(reached.values()):.1f}" if reached else "")
            line += [_cost(column, costs[column], [cell], name) for column in COSTS]
            lead = "" if name == DEFAULT else _gap(gap(own, odd[cell], name)).strip("()")
            body.append((f"`{name}`", str(len(own[name])), _mean(own[name]), lead, *line))
        head = ("algorithm", "pairs", "personal", f"to `{DEFAULT}`", *kinds, "worst 10 %")
        head = (*head, "rounds to 90 %", *COSTS.values())
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


def _untuned(algorithms: Mapping[str, Mapping[int, float]]) -> str:
    """Score of the untuned model. It is the same for all but references that see client names."""
    federated = [own for name, own in algorithms.items() if name not in REFERENCES]
    return _mean({seed: value for own in federated for seed, value in own.items()})


def _mean(own: Mapping[Any, float] | None) -> str:
    return percent(mean(own.values())) if own else ""


def percent(value: float) -> str:
    """A share in per cent, without the sign."""
    return f"{100 * value:.1f}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

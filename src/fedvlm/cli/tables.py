"""The tables that commands print at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fedvlm.metrics import METRICS, _percent, number

if TYPE_CHECKING:
    from fedvlm.rounds.comparison import Comparison
    from fedvlm.rounds.results import Results


def print_run(results: Results) -> None:
    """Prints every client's scores, with their mean, spread and worst tenth."""
    table, models = results.table, results.table["models"]
    title = f"{table['algorithm']}, {table['objective']}, {table['rounds']} rounds"
    if len(models["personal"]["clients"]) < table["clients"]:
        title += f", {len(models['personal']['clients']):,} of {table['clients']:,} clients"
    out = Table(title=f"{title}, {table['split']} rows")
    out.add_column("client", no_wrap=True)
    out.add_column("rows", justify="right")
    for head in models_shown():
        out.add_column(head, justify="right", style="bold" if head == "personal" else None)
    first, *others = results.metrics
    if len(others) > 5:  # more columns do not fit; table.csv has all of them
        others = [m for m in others if m not in ("token_f1", "bleu")]
    for metric in others:
        out.add_column(METRICS[metric].head, justify="right")
    personal = models["personal"]["clients"]
    shown = list(personal) if len(personal) <= 20 else []
    for client in shown:
        # A deployed site may have been away, or may not report its number of rows.
        scores = [models[m]["clients"].get(client) for m in models_shown()]
        cells = [number(first, found[first]) if found else "" for found in scores]
        more = [number(metric, personal[client][metric]) for metric in others]
        out.add_row(client, str(personal[client].get("examples", "")), *cells, *more)
    out.add_section()
    for key, head in (("mean", "mean"), ("std", "spread (std)"), ("worst10", "worst 10 %")):
        cells = [number(first, results.summary(m)[key]) for m in models_shown()]
        more = [number(metric, results.summary("personal", metric).get(key)) for metric in others]
        out.add_row(head, "", *cells, *more)
    console = console_for_tables()
    console.print(out)
    if table["groups"] and len(table["groups"]["models"]["personal"]) > 1:
        console.print(_groups(results))
    before = results.summary("personal_before")["mean"]
    up, down = (table["bytes"][way]["per_client_round"] for way in ("bytes_up", "bytes_down"))
    console.print(
        f"untuned, global and personal show {METRICS[first].head}; the columns after them are for "
        f"the personal model.\npersonal before the last aggregation: {number(first, before)}"
        f"   ·   sent per client and round: {size(up)} up, {size(down)} down"
        f"\nall results are in {results.folder}: table.csv, curves.png, answers/, adapters/",
        highlight=False,
    )
    if first == "exact_match" and not any(results.scores().values()):
        console.print("no answer matches exactly; if answers are long, set eval.metric=rouge_l")


def _groups(results: Results) -> Table:
    """Scores by the value of ``eval.group_by``, for the twenty values with the most rows."""
    groups, first = results.table["groups"], results.metric
    rows = groups["models"]["personal"]
    out = Table(title=f"{METRICS[first].head} by {groups['column']}, over all clients' rows")
    out.add_column(groups["column"])
    out.add_column("rows", justify="right")
    for head in models_shown():
        out.add_column(head, justify="right", style="bold" if head == "personal" else None)
    often = sorted(rows, key=lambda value: -rows[value]["examples"])
    for value in often[:20]:
        cells = [number(first, groups["models"][m][value][first]) for m in models_shown()]
        out.add_row(value, str(rows[value]["examples"]), *cells)
    if len(rows) > 20:
        out.caption = f"and {len(rows) - 20} more in groups.csv"
    return out


def models_shown() -> tuple[str, ...]:
    """The models that have a column each."""
    return ("untuned", "global", "personal")


def print_comparison(comparison: Comparison) -> None:
    """Prints one row per algorithm, the best first."""
    rows = comparison.rows
    seeds, metric = rows[0]["seeds"], rows[0]["metric"]
    title = (
        f"{METRICS[metric].head} on every client's own test rows, {seeds} seed{'s' * (seeds > 1)}"
    )
    out = Table(title=title)
    out.add_column("algorithm", style="bold")
    heads = ["personal model", "worst 10 %", "global model", "sent up", "time"]
    heads += ["over lora", "over lora+ft"]
    for head in heads:
        out.add_column(head, justify="right")
    for row in rows:
        error = row["standard_error"]
        mean = _percent(row["personal"]) + (f" ± {100 * error:.1f}" if error is not None else "")
        out.add_row(
            row["algorithm"],
            mean,
            _percent(row["worst10"]),
            _percent(row["global"]),
            size(row["bytes_up"]),
            f"{row['seconds']:.0f} s",
            _gain(row["gain_over_lora"]),
            _gain(row["gain_over_lora+ft"]),
        )
    out.add_section()
    out.add_row("(untuned)", _percent(rows[0]["untuned"]), *[""] * 6)
    console = console_for_tables()
    console.print(out)
    console.print(
        "± standard error over seeds · sent up: all clients, all rounds · "
        f"plot and tables: {comparison.folder}/comparison.png, .csv, .json",
        highlight=False,
    )


def console_for_tables() -> Console:
    """Standard output. Without a terminal it has at least 110 columns, so that nothing is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=max(110, console.width))


def _gain(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f} %"


def size(count: float) -> str:
    """Bytes in a fitting unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"

"""The tables that commands print at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedvlm.errors import brief
from fedvlm.intervals import few_rows, scored, scored_parts
from fedvlm.metrics import METRICS, _percent, number

if TYPE_CHECKING:
    from fedvlm.rounds.comparison import Comparison
    from fedvlm.rounds.results import Results

SUMMARY = (
    ("mean", "mean over clients", "interval"),
    ("mean_rows", "mean over rows", "interval_rows"),
    ("std", "spread (std)", ""),
    ("worst10", "worst 10 %", ""),
)
INTERVALS = (
    "In brackets: 95 % intervals. Shares of right answers: Wilson; other scores: bootstrap over "
    "rows; mean over clients: Student's t over clients."
)


def print_run(results: Results) -> None:
    """Prints every client's scores with their intervals, and the means over clients and rows."""
    table = results.table
    first = results.metric
    console = console_for_tables()
    console.print(_clients(results))
    if others := [m for m in results.metrics if m != first]:
        console.print(_other_metrics(results, others))
    if table["groups"] and len(table["groups"]["models"]["personal"]) > 1:
        console.print(_groups(results))
    before = results.summary("personal_before")["mean"]
    up, down = (table["bytes"][way]["per_client_round"] for way in ("bytes_up", "bytes_down"))
    console.print(
        f"{INTERVALS}\npersonal before the last aggregation: {number(first, before)}"
        f"   ·   sent per client and round: {size(up)} up, {size(down)} down"
        f"\nall results are in {results.folder}: table.csv, curves.png, answers/, adapters/",
        highlight=False,
        markup=False,
    )
    personal = table["models"]["personal"]["clients"]
    if few := few_rows({c: s["examples"] for c, s in personal.items() if "examples" in s}):
        console.print(f"[yellow]{escape(few)}[/]", highlight=False)
    if first == "exact_match" and not any(results.scores().values()):
        console.print("no answer matches exactly; if answers are long, set eval.metric=rouge_l")


def _clients(results: Results) -> Table:
    """The main metric: a row per client, the summary below."""
    table, models, first = results.table, results.table["models"], results.metric
    personal = models["personal"]["clients"]
    title = f"{table['algorithm']}, {table['objective']}, {table['rounds']} rounds"
    if len(personal) < table["clients"]:
        title += f", {len(personal):,} of {table['clients']:,} clients"
    out = _table(f"{escape(title)}: {METRICS[first].head} on {table['split']} rows", "client")
    for client in personal if len(personal) <= 20 else ():
        # A deployed site may have been away, or may not report its number of rows.
        cells = [_cell(models[m], client, first) for m in models_shown()]
        out.add_row(escape(brief(client, 40)), str(personal[client].get("examples", "")), *cells)
    out.add_section()
    for key, head, interval in SUMMARY:
        found = [results.summary(m) for m in models_shown()]
        rows = f"{models['personal']['rows'] or ''}" if key == "mean_rows" else ""
        cells = [scored(first, s.get(key), s.get(interval)) for s in found]
        out.add_row(head, rows, *cells)
    return out


def _cell(model: dict[str, Any], client: str, metric: str) -> str:
    score = model["clients"].get(client, {}).get(metric)
    return scored(metric, score, model["intervals"].get(client, {}).get(metric))


def _other_metrics(results: Results, metrics: list[str]) -> Table:
    """The other scores of the personal models: a row per metric."""
    out = Table(title="personal models, other scores")
    out.add_column("score", no_wrap=True)
    for _, head, _ in SUMMARY:
        out.add_column(head, justify="right")
    for metric in metrics:
        found = results.summary("personal", metric)
        cells = [scored(metric, found.get(key), found.get(ends)) for key, _, ends in SUMMARY]
        out.add_row(METRICS[metric].head, *cells)
    return out


def _groups(results: Results) -> Table:
    """Scores by the value of ``eval.group_by``, for the twenty values with the most rows."""
    groups, first = results.table["groups"], results.metric
    rows, column = groups["models"]["personal"], brief(groups["column"], 40)
    title = f"{METRICS[first].head} by {column}, over all clients' rows"
    out = _table(escape(title), escape(column))
    often = sorted(rows, key=lambda value: -rows[value]["examples"])
    for value in often[:20]:
        cells = [
            scored(
                first, groups["models"][m][value][first], groups["intervals"][m][value].get(first)
            )
            for m in models_shown()
        ]
        out.add_row(escape(brief(value, 40)), str(rows[value]["examples"]), *cells)
    if len(rows) > 20:
        out.caption = f"and {len(rows) - 20} more in groups.csv"
    return out


def _table(title: str, head: str) -> Table:
    """A table with a column of names, of rows, and of each model; narrow enough for 80 columns."""
    out = Table(title=title)
    out.add_column(head, overflow="fold")
    out.add_column("rows", justify="right")
    for model in models_shown():
        out.add_column(model, justify="right", style="bold" if model == "personal" else None)
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
    out.add_column("algorithm", style="bold", no_wrap=True)
    heads = ["personal model", "mean over rows", "worst 10 %", "global model", "sent up", "time"]
    heads += ["over lora", "over lora+ft"]
    for head in heads:
        out.add_column(head, justify="right", overflow="fold")
    for row in rows:
        error, low, high = (row[k] for k in ("standard_error", "personal_low", "personal_high"))
        bounds = None if low is None else (low, high)
        mean = "\n".join(scored_parts(metric, row["personal"], bounds))
        mean += f" ± {100 * error:.1f}" if error is not None else ""
        out.add_row(
            escape(brief(row["algorithm"], 40)),
            mean,
            number(metric, row["personal_rows"]),
            _percent(row["worst10"]),
            _percent(row["global"]),
            size(row["bytes_up"]),
            f"{row['seconds']:.0f} s",
            _gain(row["gain_over_lora"]),
            _gain(row["gain_over_lora+ft"]),
        )
    out.add_section()
    out.add_row("(untuned)", _percent(rows[0]["untuned"]), *[""] * 7)
    console = console_for_tables()
    console.print(out)
    console.print(
        "personal model: mean over clients, below it the 95 % interval over clients · "
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

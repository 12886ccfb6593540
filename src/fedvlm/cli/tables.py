"""The tables that commands print at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedvlm.errors import brief, counted
from fedvlm.intervals import few_rows, scored, scored_parts
from fedvlm.metrics import METRICS, _percent, number, size
from fedvlm.privacy import statement
from fedvlm.rounds.claims import BASELINES, harm
from fedvlm.rounds.grouped import cells, shown_metrics
from fedvlm.rounds.results import UNSCORED

if TYPE_CHECKING:
    from fedvlm.rounds.comparison import Comparison
    from fedvlm.rounds.results import Results

MOST_BY_CLIENT = 40  # rows of the table by client and value
SUMMARY = (
    ("mean", "mean over clients", "interval"),
    ("mean_rows", "mean over rows", "interval_rows"),
    ("std", "spread (std)", ""),
    ("worst10", "worst 10 %", ""),
)
PLAIN: dict[str, Any] = {"highlight": False, "markup": False}
INTERVALS = (
    "In brackets: 95 % intervals. Shares of right answers: Wilson; other scores: bootstrap over "
    "rows; mean over clients: Student's t over clients."
)


def print_run(results: Results) -> None:
    """Prints every client's scores with their intervals, and the means over clients and rows."""
    table = results.table
    first = results.metric
    console = console_for_tables()
    up, down = (table["bytes"][way]["per_client_round"] for way in ("bytes_up", "bytes_down"))
    sent = f"sent per client and round: {size(up)} up, {size(down)} down"
    if not results.metrics:
        console.print(
            f"{UNSCORED}\n{sent}\nall results are in {results.folder}: adapters/", **PLAIN
        )
        return
    console.print(_clients(results))
    if others := [m for m in results.metrics if m != first]:
        console.print(_other_metrics(results, others))
    if table["groups"] and len(table["groups"]["models"]["personal"]) > 1:
        console.print(_groups(results))
        if found := _groups_by_client(results):
            console.print(found)
    if "personal_before" in table["models"]:
        before = number(first, results.summary("personal_before")["mean"])
        sent = f"personal before the last aggregation: {before}   ·   {sent}"
    console.print(
        f"{INTERVALS}\n{sent}"
        f"\nall results are in {results.folder}: table.csv, curves.png, answers/, adapters/",
        **PLAIN,
    )
    if (earlier := table.get("planned")) and earlier[-1].get("stopped"):
        console.print(
            f"stopped after round {table['rounds']} of {earlier[-1]['rounds']}: the validation "
            "loss no longer fell (train.patience)",
            **PLAIN,
        )
    if about := table.get("privacy"):
        told = f"privacy (simulated): {statement.guarantee(about, about['spent'])}"
        if about["rounds"] < table["rounds"]:
            told += f"; the budget ended the run after round {about['rounds']} of {table['rounds']}"
        console.print(told, highlight=False, markup=False)
    personal = table["models"]["personal"]["clients"]
    if few := few_rows({c: s["examples"] for c, s in personal.items() if "examples" in s}):
        console.print(f"[yellow]{escape(few)}[/]", highlight=False)
    if first == "exact_match" and not any(results.scores().values()):
        console.print("no answer matches exactly; if answers are long, set eval.metric=rouge_l")


def _clients(results: Results) -> Table:
    """The main metric: a row per client, the summary below."""
    table, models, first = results.table, results.table["models"], results.metric
    personal = models["personal"]["clients"]
    title = f"{table['algorithm']}, {table['objective']}, {counted(table['rounds'], 'round')}"
    if len(personal) < table["clients"]:
        title += f", {len(personal):,} of {counted(table['clients'], 'client')}"
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


def _groups_by_client(results: Results) -> Table | None:
    """The personal models by client and value; None for more than forty rows."""
    column, answers = results.table["groups"]["column"], results.answers("personal")
    metrics = shown_metrics(results.metric, results.metrics)
    rows = list(cells(metrics, answers))
    if len(rows) > MOST_BY_CLIENT:
        return None
    out = Table(title=escape(f"personal models by client and {brief(column, 40)}"))
    out.add_column("client", overflow="fold")
    out.add_column(escape(brief(column, 20)), overflow="fold")
    out.add_column("rows", justify="right")
    for metric in metrics:
        out.add_column(METRICS[metric].head, justify="right")
    last = None
    for client, value, count, scores in rows:
        if client != last and last is not None:
            out.add_section()
        name = (brief(client, 24) or "all") if client != last else ""
        out.add_row(escape(name), escape(brief(value, 24)), count, *scores)
        last = client
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
    """Prints a row per algorithm, the best first, and then the verdict for each client.

    Both tables fit 80 columns. A gain is shown only where its interval excludes zero, and only over
    a baseline that took as many steps.
    """
    rows = comparison.rows
    seeds, metric = rows[0]["seeds"], rows[0]["metric"]
    title = f"{METRICS[metric].head} on every client's own test rows, {counted(seeds, 'seed')}"
    out = _narrow(title)
    out.add_column("algorithm", style="bold", overflow="fold", min_width=9)
    heads = ["personal\nmodel", "worst\n10 %", "global\nmodel"]
    heads += [f"over\n{baseline}" for baseline in BASELINES]
    for head in [*heads, "steps,\npasses", "sent up,\ntime"]:
        out.add_column(head, justify="right", no_wrap=True)
    counts = {row["algorithm"]: row["steps"] for row in rows}
    for row in rows:
        error, low, high = (row[k] for k in ("standard_error", "personal_low", "personal_high"))
        bounds = None if low is None else (low, high)
        mean = "\n".join(scored_parts(metric, row["personal"], bounds))
        mean += f"\n± {100 * error:.1f}" if error is not None else ""
        passes = f"{row['passes']:,.0f}" if row["passes"] else ""
        steps = f"{row['steps']:,.0f}" if row["steps"] else "unknown"
        out.add_row(
            escape(brief(row["algorithm"], 40)),
            mean,
            _percent(row["worst10"]),
            _percent(row["global"]),
            *(_gain(row, baseline, counts) for baseline in BASELINES),
            f"{steps}\n{passes}",
            f"{size(row['bytes_up'])}\n{row['seconds']:,.0f} s",
        )
    out.add_section()
    out.add_row("(untuned)", _percent(rows[0]["untuned"]), *[""] * 6)
    console = console_for_tables()
    console.print(out)
    if uneven := unequal_steps(counts):
        console.print(f"[yellow]{escape(uneven)}[/]", highlight=False)
    below = "± standard error over seeds" if seeds > 1 else "its 95 % interval over clients"
    console.print(
        f"personal model: mean over clients, below it {below} · over local, over lora: gain in "
        "the mean, and its 95 % interval; unclear: the interval includes zero, or there are fewer "
        "than three pairs of (seed, client) · steps, passes: optimizer steps and forward passes "
        "(in rows) of all clients · sent up: by all clients in all rounds · "
        f"plot and tables: {comparison.folder}/comparison.png, .csv, .json",
        highlight=False,
        markup=False,
    )
    if comparison.verdicts:
        _print_verdicts(console, comparison.verdicts)


def unequal_steps(counts: Mapping[str, float | None]) -> str:
    """A sentence on algorithms that took other steps than a baseline; empty without such.

    Args:
        counts: algorithm -> its optimizer steps; None: unknown.
    """
    there = {baseline: counts[baseline] for baseline in BASELINES if baseline in counts}
    others = [a for a, n in counts.items() if any(n is None or n != m for m in there.values())]
    if not others:
        return ""
    shown = {
        name: "unknown" if (n := counts[name]) is None else f"{n:,.0f}"
        for name in dict.fromkeys([*others, *there])
    }
    listed = ", ".join(f"{brief(name, 40)} {count}" for name, count in shown.items())
    return f"unequal steps: {listed}. No gain is shown between runs of unequal steps."


def _gain(row: Mapping[str, Any], baseline: str, counts: Mapping[str, float | None]) -> str:
    if baseline not in counts or row["algorithm"] == baseline:
        return ""
    if row["steps"] is None or row["steps"] != counts[baseline]:
        return "unequal\nsteps"
    found, low, high = (row[f"gain_over_{baseline}{end}"] for end in ("", "_low", "_high"))
    if found is None or low is None or low <= 0 <= high:
        return "unclear"
    return f"{100 * found:+.1f} %\n{100 * low:+.0f} to {100 * high:+.0f}"


def _harm(gains: Mapping[str, Mapping[str, float]]) -> str:
    name = harm(gains)
    return f"{name} {100 * gains[name]['gain']:+.1f}" if name else ""


def _narrow(title: str) -> Table:
    """A table for 80 columns: no lines between columns."""
    return Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def _print_verdicts(console: Console, verdicts: Sequence[Mapping[str, Any]]) -> None:
    """A line per client: the verdict, the gain that decides, and the way of sharing to avoid."""
    out = _narrow("Should a site take part? The verdict for each")
    out.add_column("site", overflow="fold")
    out.add_column("verdict", style="bold", no_wrap=True)
    for head in ("points\nover local", "95 %\ninterval", "rows", "clearly\nharmful"):
        out.add_column(head, justify="right", no_wrap=True)
    for found in verdicts:
        low, high = 100 * found["low"], 100 * found["high"]
        out.add_row(
            escape(brief(found["client"], 40)),
            found["verdict"],
            f"{found['algorithm']} {100 * found['gain']:+.1f}",
            f"{low:+.1f} to {high:+.1f}",
            f"{found['n']:,}",
            _harm(found["gains"]),
        )
    console.print(out)
    counted = Counter(found["verdict"] for found in verdicts)
    ways = len(verdicts[0]["gains"])
    console.print(
        ", ".join(f"{verdict}: {n} of {len(verdicts)}" for verdict, n in counted.most_common())
        + ". Rows: held-out rows of all seeds, paired with those of local. "
        + (f"All {ways} intervals of a site hold together with 95 %. " if ways > 1 else "")
        + "stay alone: no way of sharing is ahead, and the one shown is clearly behind. Clearly "
        "harmful: the way that is furthest behind local, where its interval excludes zero.",
        highlight=False,
        markup=False,
    )


def console_for_tables() -> Console:
    """Standard output. Without a terminal it has at least 110 columns, so that nothing is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=max(110, console.width))

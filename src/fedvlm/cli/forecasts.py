"""The table that ``fedvlm run --dry-run`` prints."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from fedvlm.cli.tables import console_for_tables, size
from fedvlm.errors import brief, counted
from fedvlm.planning.forecast import Forecast, Spread
from fedvlm.privacy import statement

UNKNOWN = "not known"
MOST_NAMED = 12  # clients


def print_forecast(plan: Forecast) -> None:
    """Prints one line per planned quantity, and the reason for each unknown quantity."""
    config = plan.config
    title = f"{config.algorithm.name}, {config.objective.name}: plan of this run"
    out = Table(title=title, show_header=False)
    out.add_column(style="bold", no_wrap=True)
    out.add_column()
    rows = (*_work(plan), *_model(plan), *_messages(plan), *_privacy(plan), *_memory(plan))
    for head, text in rows:
        out.add_row(head, Text(text))  # names are text, no markup
    console = console_for_tables()
    console.print(out)
    for reason in plan.unknown:
        console.print(f"not known: {reason}", highlight=False, markup=False)
    if plan.size:
        console.print(
            "A run with weights removes LoRA from layers that get no gradient. If the model has "
            "such layers, the run trains and sends less.",
            highlight=False,
        )
    console.print("nothing was trained or written", highlight=False)


def _work(plan: Forecast) -> Iterator[tuple[str, str]]:
    rounds = f"{plan.config.train.rounds:,}"
    yield "clients", _number(plan.clients) + _named(plan.names)
    yield "clients per round", _number(plan.cohort)
    yield "rounds", rounds + _last_round(plan)
    for split in ("train", "val", "test"):
        yield f"{split} rows per client", _spread(plan.rows.get(split))
    yield "optimizer steps", _each(plan.steps, _number(plan.all_steps))
    yield "examples seen", _number(plan.examples)


def _named(names: tuple[str, ...]) -> str:
    """The names of the clients, which shows whether a column has made the sites that one wants."""
    if not names:
        return ""
    left = len(names) - MOST_NAMED
    more = f" and {left:,} more" if left > 0 else ""
    return ": " + ", ".join(brief(name, 40) for name in names[:MOST_NAMED]) + more


def _last_round(plan: Forecast) -> str:
    if not plan.tuning:
        return ""
    tunes = plan.config.train.tuning
    return ", then local tuning of all clients" if tunes else "; then each averages its rounds"


def _model(plan: Forecast) -> Iterator[tuple[str, str]]:
    model, found = plan.config.model, plan.size
    kind = model.dtype if model.quantization == "none" else model.quantization
    held = f"{found.parameters:,} parameters, {size(found.weights)} ({kind})" if found else UNKNOWN
    yield "frozen model", f"{model.name}: {held}"
    yield "trained adapter", f"{found.trained:,} parameters per client" if found else UNKNOWN


def _messages(plan: Forecast) -> Iterator[tuple[str, str]]:
    for way in ("up", "down"):
        total = f"{plan.all_sent[way]:,} ({size(plan.all_sent[way])})" if plan.all_sent else UNKNOWN
        yield f"bytes {way}", _each(plan.sent.get(way), total)


def _privacy(plan: Forecast) -> Iterator[tuple[str, str]]:
    about = plan.privacy
    if about is None:
        return
    yield "privacy (simulated)", statement.guarantee(about)
    yield "noise", statement.mechanism(about)
    if warning := statement.loud(about):
        yield "warning", warning
    if about["rounds"] < plan.config.train.rounds:
        yield "budget", f"it ends the run after round {about['rounds']}"


def _memory(plan: Forecast) -> Iterator[tuple[str, str]]:
    found = plan.size
    if found is None:
        yield "memory", UNKNOWN
        return
    divided = " divided among the processes" if plan.config.model.shard else ""
    if found.room < found.each:
        yield (
            "memory",
            f"{size(found.weights)} for the frozen weights{divided}, which leaves too little for a "
            f"client: {size(found.each)} for adapter and optimizer, plus its batch. A pass of one "
            "client may not fit; see docs/memory.md",
        )
        yield "engine", f"{found.engine}, 1 client per pass"
        return
    yield (
        "memory",
        f"{size(found.weights)} for the frozen weights{divided}, and at most {size(found.room)} "
        f"for the clients of one pass: {size(found.each)} per client for adapter and optimizer, "
        "plus its batch, which is measured when the run begins",
    )
    yield "engine", f"{found.engine}, at most {counted(found.most, 'client')} per pass"


def _each(found: Spread | None, total: str) -> str:
    return f"{_spread(found)} per client and round; {total} in total" if found else UNKNOWN


def _number(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _spread(found: Spread | None) -> str:
    if found is None:
        return UNKNOWN
    if found.least == found.most:
        return f"{found.median:,.10g}"
    return f"{found.least:,.10g} to {found.most:,.10g}, median {found.median:,.10g}"

"""The tables of the commands after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedvlm.cli.tables import console_for_tables
from fedvlm.errors import brief, counted
from fedvlm.intervals import few_rows, scored_parts
from fedvlm.metrics import METRICS

if TYPE_CHECKING:
    from fedvlm.after.evaluate import Evaluation
    from fedvlm.after.onboard import Onboarded
    from fedvlm.after.predict import Answers, SideBySide

MOST_ROWS = 40
SITE_MODELS = {
    "untuned": "before training",
    "shared": "shared model, as downloaded",
    "alone": "trained alone, the same steps",
    "personal": "personal",
}


def print_answers(answers: Answers, out: str | Path | None) -> None:
    """Prints a single answer as text, else a table: a row per question, a column per model."""
    if out is not None:
        rows, models = counted(len(answers.rows), "row"), counted(len(answers.models), "model")
        print(f"{rows}, {models}, written to {out}")
        return
    if len(answers.rows) == 1 and len(answers.models) == 1:
        print(answers.rows[0][answers.models[0]])
        return
    questions = {row["question"] for row in answers.rows}
    alone = questions.pop() if len(questions) == 1 else None  # a single question is the title
    shown = Table(title=alone and escape(alone))
    heads = [name for name in answers.rows[0] if alone is None or name != "question"]
    for name in heads:
        shown.add_column(name, style="bold" if name in answers.models else None, overflow="fold")
    for row in answers.rows[:MOST_ROWS]:
        cells = {**row, "image": Path(row["image"]).name} if "image" in row else row
        shown.add_row(*(escape(str(cells[name])) for name in heads))
    console = console_for_tables()
    console.print(shown)
    if len(answers.rows) > MOST_ROWS:
        left = len(answers.rows) - MOST_ROWS
        console.print(f"and {left} more rows; --out answers.jsonl writes all rows", highlight=False)


def print_side_by_side(found: SideBySide, picture: Path, run: str) -> None:
    """Prints a question and every answer with the models that give it, in at most 80 columns."""
    given: dict[str, list[str]] = {}
    for model, answer in found.answers.items():
        given.setdefault(answer, []).append(model)
    shown = Table(title=escape(f"{found.question}  ({found.reference})"), width=78)
    shown.add_column("answer", style="bold", overflow="fold", ratio=2)
    shown.add_column("models", overflow="fold", ratio=3)
    for answer, models in given.items():
        shown.add_row(escape(answer) or "(nothing)", escape(", ".join(models)))
    console = console_for_tables()
    console.print(shown)
    console.print(
        f"One picture ({picture}), held out by {found.client}, whose answer is in brackets; the "
        f"models of {run}. Ask them more: fedvlm predict {picture.parent / run} {picture} "
        '"..." --all',
        highlight=False,
        markup=False,
    )


def print_evaluation(found: Evaluation, out: str | Path | None) -> None:
    """Prints one row per model and one column per metric."""
    console = console_for_tables()
    title = f"{counted(found.rows, 'row')} of {brief(found.data, 200)}"
    console.print(_scores(title, found.scores, found.intervals))
    _warn(console, found.rows)
    if out is not None:
        console.print(f"written to {out}", highlight=False, markup=False)


def print_onboarded(site: Onboarded) -> None:
    """Prints one row per kind of model, the personal model last."""
    table = site.table
    count = site.scores["personal"]["examples"]
    title = f"site {brief(table['site'], 40)}, {count:g} {table['split']} rows"
    named = {SITE_MODELS[m]: s for m, s in site.scores.items()}
    console = console_for_tables()
    bounds = {SITE_MODELS[m]: found for m, found in table["intervals"].items()}
    console.print(_scores(title, named, bounds))
    _warn(console, count)
    console.print(
        f"trained: {table['trained']}; up to {table['steps']} steps on "
        f"{table['rows']['train']} rows\n"
        f"all results are in {site.folder}: the adapter, personal.safetensors, scores.json, "
        "README.md",
        highlight=False,
        markup=False,
    )


def _scores(
    title: str,
    scores: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, Sequence[float]]],
) -> Table:
    """A row per model and a column per metric, with each interval below its score."""
    measured = next(iter(scores.values()))
    metrics = [m for m in METRICS if m in measured]
    shown = Table(title=escape(title), caption="below the scores: 95 % intervals over rows")
    shown.add_column("model", style="bold", overflow="fold")
    for metric in metrics:
        shown.add_column(METRICS[metric].head, justify="right", overflow="fold")
    for name, numbers in scores.items():
        bounds = intervals.get(name, {})
        cells = ["\n".join(scored_parts(m, numbers[m], bounds.get(m))) for m in metrics]
        shown.add_row(escape(brief(name, 40)), *cells)
    return shown


def _warn(console: Console, rows: float) -> None:
    if few := few_rows({"": rows}):
        console.print(f"[yellow]{few}[/]", highlight=False)

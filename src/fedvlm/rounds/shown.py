"""Results as a program shows them: one line, a pandas table, a table in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm.errors import counted
from fedvlm.intervals import ends
from fedvlm.metrics import METRICS, number

if TYPE_CHECKING:
    import pandas as pd

SHOWN = ("untuned", "global", "personal")
MOST = 50  # clients in a notebook's table


def line(folder: Path, table: Mapping[str, Any]) -> str:
    """A run in one line."""
    metric, models = table["metric"], table["models"]
    scores = [
        f"{model} {number(metric, models[model]['summary'][metric]['mean'])}"
        for model in SHOWN
        if metric in models[model]["summary"]
    ]
    told = f"{METRICS[metric].head}: {', '.join(scores)}" if scores else "no scores"
    size = f"{counted(table['rounds'], 'round')}, {counted(table['clients'], 'client')}"
    return f"<Results of '{folder}': {table['algorithm']}, {size}; {told}>"


def rows_of(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each client and model, with all scores and the ends of their 95 % intervals."""
    return [
        {"client": client, "model": model, **scores, **ends(scores, found["intervals"][client])}
        for model, found in table["models"].items()
        for client, scores in found["clients"].items()
    ]


def frame(table: Mapping[str, Any]) -> pd.DataFrame:
    """:func:`rows_of` as a table of pandas."""
    import pandas as pd

    return pd.DataFrame(rows_of(table))


def html(folder: Path, table: Mapping[str, Any]) -> str:
    """A run as a table of its main score: a row for each client, a column for each model."""
    import pandas as pd

    metric, models = table["metric"], [table["models"][name] for name in SHOWN]
    clients = list(models[-1]["clients"])
    columns = {
        name: [number(metric, found["clients"].get(c, {}).get(metric)) for c in clients[:MOST]]
        for name, found in zip(SHOWN, models, strict=True)
    }
    rows = pd.DataFrame(columns, index=pd.Index(clients[:MOST], name="client"))
    left = f"<p>and {len(clients) - MOST} more clients: to_pandas()</p>" * (len(clients) > MOST)
    return f"<p>{escape(line(folder, table)[1:-1])}</p>{rows.to_html(escape=True)}{left}"


def compared(rows: Sequence[Mapping[str, Any]]) -> str:
    """A comparison in one line: its algorithms, the best first."""
    metric = rows[0]["metric"]
    means = [f"{row['algorithm']} {number(metric, row['personal'])}" for row in rows]
    return f"{METRICS[metric].head} of the personal models: {', '.join(means)}"

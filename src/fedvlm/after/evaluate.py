"""evaluate(): scores a run's models on new data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fedvlm.after.opened import Opened, open_run
from fedvlm.after.outputs import check_out, write_table
from fedvlm.engines.functions import Function, checked
from fedvlm.intervals import ends, intervals
from fedvlm.metrics import admit, average
from fedvlm.settings.sections import Config


@dataclass(frozen=True)
class Evaluation:
    """Scores on one set of rows.

    Attributes:
        data: the source of the rows.
        rows: number of rows.
        scores: model -> metric -> number.
        intervals: model -> metric -> [low, high], at 95 %.
    """

    data: str
    rows: int
    scores: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def table(self) -> list[dict[str, Any]]:
        """One dict per model, for files."""
        return [
            {"model": m, **s, **ends(s, self.intervals.get(m, {})), "data": self.data}
            for m, s in self.scores.items()
        ]


def evaluate(
    folder: str | Path,
    data: str | Path,
    *overrides: str,
    clients: Sequence[str] | None = None,
    global_: bool = False,
    untuned: bool = True,
    max_rows: int | None = None,
    out: str | Path | None = None,
    metrics: Mapping[str, Function] | None = None,
) -> Evaluation:
    """Scores a finished run's models on new data, all on the same rows.

    Args:
        folder: the run's folder.
        data: a file, folder or hub name, with the run's columns (``data.columns.answer=...`` maps
            other names).
        *overrides: settings that differ from the run's, in the sections model, data, eval and
            engine.
        clients: clients to score with their personal models. If this is None and ``global_`` is
            False, all clients' models and the global model are scored.
        global_: also score the global model.
        untuned: also score the model before training.
        max_rows: score a seeded sample of this many rows; None means all rows.
        out: also write the scores to this file (.json, .jsonl, .csv or .parquet).
        metrics: the program's own metrics, as for :func:`fedvlm.run`; None: the others alone.

    Raises:
        FedVLMError: the run is not finished, there is no such client, or the data cannot be used.
    """
    from fedvlm.data.sources import load_rows

    functions = checked(metrics)
    admit(functions)
    run = open_run(folder, *overrides)
    check_out(out, data, *run.inputs)
    every = clients is None and not global_
    names = tuple(clients or ((*run.clients, *run.onboarded) if every else ()))
    for name in names:
        run.adapter_folder(name)
    config = on_new_data(run.config, data, max_rows)
    rows = run.usable(load_rows(config.data, config.seed, pairs=run.pairs))
    models = run.chosen(names, global_=global_ or every, untuned=untuned, every=False)
    found = Evaluation(str(data), len(rows), *score(run, rows, config, models, functions))
    if out is not None:
        write_table(found.table(), out)
    return found


def on_new_data(config: Config, data: str | Path, max_rows: int | None = None) -> Config:
    """A run's settings for new rows, without the limits on the run's own rows."""
    path = {"path": str(data), "max_rows": max_rows}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=path),
            "eval": config.eval.model_copy(update={"max_rows": None}),
        }
    )


def score(
    run: Opened,
    rows: Any,
    config: Config,
    models: dict[str, Any],
    functions: Mapping[str, Function] | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]:
    """Scores of each adapter on all rows, and their intervals."""
    from fedvlm.data.partition import Split

    nothing, everything = np.empty(0, np.int64), np.arange(len(rows))
    split = Split(**{**dict.fromkeys(("train", "val", "test"), nothing), "test": everything})
    settings = config.model_copy(update={"eval": config.eval.model_copy(update={"split": "test"})})
    with TemporaryDirectory() as scratch:
        engine = run.engine(rows, {"all": split}, settings, Path(scratch))
        engine.functions = functions or {}
        found = {name: engine.answers([("all", tree)])["all"] for name, tree in models.items()}
    return {m: average(a) for m, a in found.items()}, {m: intervals(a) for m, a in found.items()}

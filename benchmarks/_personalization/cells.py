"""The cells of the personalization benchmark, and the settings of a run in a cell."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvlm.algorithms.table import TABLE, taken
from fedvlm.config import load
from fedvlm.settings.sections import Config

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos.parquet"
SITES = 6  # clients of a cell; the photographs have six origins
VALIDATION, TEST = 12, 96  # rows of a client for validation, and for scores
FEW_TEST = 24  # rows for scores in `partial`, where 20 clients are scored
MANY, COHORT, SCORED = 100, 10, 20  # clients, cohort and scored clients of `partial`
STRENGTHS = (0.5, 1.0)
AMOUNTS = (24, 80, 240)
MIDDLE = 80
SEEDS = 5
JOINED = "joined-"  # prefix of the regime of clients that join a run; the run's regime follows
JOINERS = 2

TUNED = "lora+ft"
"""An arm beside the algorithms of the table: `lora`, whose last steps are local tuning."""

ALGORITHMS = (*(name for name in TABLE if name not in ("share", "fedalora")), TUNED)
"""All algorithms but two: `share` needs a map, and `fedalora` equals `plora` at equal ranks."""

REFERENCES = tuple(name for name, entry in TABLE.items() if entry.pools)
"""Algorithms without a federation. The tables show them, and ranks leave them out."""

OWN: dict[str, dict[str, Any]] = {
    "scaffold": {"train": {"optimizer": "sgd"}},
    TUNED: {"train": {"rounds": 20, "finish_steps": 20}},  # 120 steps, like the others
}
"""Settings that an algorithm requires."""

RATES = {"adamw": (0.002, 0.005, 0.01), "sgd": (0.1, 0.2, 0.5)}
"""Optimizer -> candidate learning rates of every algorithm."""


@dataclass(frozen=True)
class Cell:
    """A setting in which all algorithms are compared.

    Attributes:
        regime: a style of scenes, `photos`, `partial`, or `joined-` and a regime.
        strength: strength of the difference between clients; None for natural data.
        rows: training rows a client, on average.
    """

    regime: str
    strength: float | None
    rows: int

    @property
    def name(self) -> str:
        """The name of the cell in folders and in `--cells`."""
        strength = "" if self.strength is None else f"-{self.strength:g}"
        return f"{self.regime}{strength}-{self.rows}"

    @property
    def base(self) -> Cell:
        """The cell of the training runs. For clients that join, this is the cell of their run."""
        return Cell(self.regime.removeprefix(JOINED), self.strength, self.rows)


TUNED_ON = {
    "alike": Cell("iid", 0.0, MIDDLE),
    "differ": Cell("mixed", 1.0, MIDDLE),
    "photos": Cell("photos", None, MIDDLE),
}
"""Kind of regime -> the cell that chooses its learning rates."""


def kind(cell: Cell) -> str:
    """The kind of regime whose learning rates a cell uses."""
    regime = cell.base.regime
    return {"iid": "alike", "quantity": "alike"}.get(
        regime, regime if regime in TUNED_ON else "differ"
    )


def full() -> list[Cell]:
    """Every cell of the benchmark."""
    cells = [Cell("iid", 0.0, rows) for rows in AMOUNTS]
    for regime in ("label", "covariate", "concept", "quantity", "mixed"):
        cells += [Cell(regime, strength, MIDDLE) for strength in STRENGTHS[:-1]]
        cells += [Cell(regime, STRENGTHS[-1], rows) for rows in AMOUNTS]
    cells += [Cell("photos", None, rows) for rows in AMOUNTS]
    cells.append(Cell("partial", 1.0, AMOUNTS[0]))
    return [*cells, Cell(JOINED + "iid", 0.0, MIDDLE), Cell(JOINED + "mixed", 1.0, MIDDLE)]


MAIN = {
    "cells": (
        "iid-0-80",
        "label-1-80",
        "covariate-1-80",
        "concept-1-80",
        "mixed-0.5-80",
        "mixed-1-24",
        "mixed-1-80",
        "photos-80",
    ),
    "algorithms": ("auto", "local", "fedsa", "plora", "lora", TUNED),
    "seeds": tuple(range(SEEDS)),
}
"""The default part: two to four hours on two cores, depending on the machine and its load. The
whole benchmark takes seven times as long."""

SMALL = {
    "cells": ("iid-0-80", "mixed-1-80"),
    "algorithms": ("auto", "plora", "lora", "local"),
    "seeds": (0, 1),
}
"""The part of `--small`."""


def settings(cell: Cell) -> dict[str, Any]:
    """The settings of a cell, the same for all algorithms and seeds."""
    test = FEW_TEST if cell.regime == "partial" else TEST
    total = cell.rows + VALIDATION + test
    sites = MANY if cell.regime == "partial" else SITES
    style = "mixed" if cell.regime == "partial" else cell.regime
    tree: dict[str, Any] = {
        "data": {
            "val_fraction": VALIDATION / total,
            "test_fraction": test / total,
            "scenes": {"style": style, "strength": cell.strength, "sites": sites, "rows": total},
        },
        "partition": {"min_rows": 4},
        "train": {"rounds": 24, "local_steps": 5, "batch_size": 4},
        "lora": {"target": "language"},
        "aggregate": {"kind": "mean"},  # as in the papers
        "eval": {"every": 0, "max_rows": TEST},
        "engine": {"threads": 1},
    }
    if cell.regime == "photos":
        del tree["data"]["scenes"]
        tree["data"] |= {"path": str(PHOTOS), "max_rows": SITES * total}
        tree["partition"] |= {"kind": "column", "column": "origin_dataset"}
    if cell.regime == "partial":
        tree["train"] |= {"clients_per_round": COHORT}
        tree["eval"] |= {"clients": SCORED}
    return tree


def rates(algorithm: str) -> tuple[float, ...]:
    """The candidate learning rates of an algorithm."""
    optimizer = OWN.get(algorithm, {}).get("train", {}).get("optimizer", "adamw")
    return RATES[optimizer]


def run_config(
    cell: Cell, algorithm: str, rate: float, seed: int, output: Path, extra: Mapping[str, Any]
) -> Config:
    """The settings of one run.

    Args:
        cell: the cell of the run. The run trains in its base.
        algorithm: a name from the table.
        rate: learning rate of both factors.
        seed: seed of rows, partition, initial adapter, cohorts and batches.
        output: folder of the run.
        extra: sections to add, such as the sections of a shorter form.
    """
    tree = settings(cell.base)
    for other in (OWN.get(algorithm, {}), extra, {"train": {"lr": rate}}):
        tree = merged(tree, other)
    name = "lora" if algorithm == TUNED else algorithm
    tree["algorithm"] = taken(name, tree.get("algorithm", {}))
    return load(tree | {"seed": seed, "output": str(output)})


def merged(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A tree whose leaves are replaced by the leaves of another tree."""
    found = copy.deepcopy(dict(tree))
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else copy.deepcopy(value)
    return found

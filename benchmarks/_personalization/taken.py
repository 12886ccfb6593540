"""Finished runs of `fedvlm compare` as runs of a real cell."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _personalization import real, runs
from _personalization.cells import TUNED, Cell
from fedvlm.config import load
from fedvlm.errors import FedVLMError
from fedvlm.metrics import mean
from fedvlm.rounds.results import Results
from fedvlm.settings.sections import Config
from fedvlm.store import files
from fedvlm.store.run import DONE

APART = ("algorithm", "output", "seed", "engine")  # differ between the runs of a cell
LENGTH = ("rounds", "finish_steps")  # of the section `train`; the tables show the steps


def take(folder: Path, output: Path) -> int:
    """Measures the finished runs in a folder of `fedvlm compare`; their files stay as they are.

    Returns:
        The number of runs that the output folder lacked.

    Raises:
        FedVLMError: there is no finished run, or an earlier one of the cell has other settings.
    """
    found = sorted(path.parent for path in folder.glob(f"*/{DONE}"))
    if not found:
        raise FedVLMError(f"--take {folder}: there is no finished run of fedvlm compare in it")
    return sum(_one(path, output) for path in found)


def _one(folder: Path, output: Path) -> bool:
    config = load(folder / "config.yaml")
    cell = real.Real(_cell(config, folder), _settings(config), (config.train.lr,))
    where = output / real.FOLDER / cell.cell.name
    there = _there(where / real.CELL)
    arm = _arm(config, there)
    _check(cell, there, where, length=arm != TUNED)
    target = where / f"{arm}-{config.train.lr:g}-seed-{config.seed}" / runs.MEASURED
    if target.exists():
        return False
    if there is None:
        real.keep(cell, output)
    results = Results.read(folder)
    results = dataclasses.replace(results, table=results.table | {"metric": real.METRIC})
    rows = runs.rows_of(results, files.read_lines(folder / "metrics.jsonl"))
    loss = results.summary("personal", "loss")["mean"]
    packages = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["packages"]
    version = f"of a run of fedvlm {packages['fedvlm']}"
    runs.write(target, config, None, rows, loss, runs.clients_of(results), version)
    return True


def _cell(config: Config, folder: Path) -> Cell:
    parts = json.loads((folder / "partition.json").read_text(encoding="utf-8"))["clients"]
    train = mean(len(client["train"]) for client in parts)
    by = config.partition.column or config.partition.kind
    data, model = Path(config.data.path or "scenes").stem, Path(config.model.name).name
    return Cell(f"{data}-{by}-{model}", None, round(train))


def _settings(config: Config) -> dict[str, Any]:
    tree = {k: v for k, v in config.model_dump().items() if k not in APART}
    tree["data"] |= {"path": config.data.path or "scenes"}
    tree["eval"] |= {"metric": real.METRIC}
    return tree


def _there(path: Path) -> dict[str, Any] | None:
    """The settings of the cell; None for a new one, which gets those of its first run."""
    if not path.exists():
        return None
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
    return settings


def _arm(config: Config, there: Mapping[str, Any] | None) -> str:
    """The name in the tables: lora with other steps of local tuning than the cell is `lora+ft`."""
    name = config.algorithm.name
    usual = config.train.finish_steps if there is None else there["train"].get("finish_steps")
    return TUNED if name == "lora" and config.train.finish_steps != usual else name


def _check(cell: real.Real, there: Mapping[str, Any] | None, where: Path, *, length: bool) -> None:
    """Refuses a run of other settings than the cell has.

    Args:
        cell: the cell with the settings of the run.
        there: the settings of the cell.
        where: the folder of the cell.
        length: whether rounds and tuning have to agree as well.
    """
    trees = [dict(cell.told["settings"] if there is None else there), dict(cell.told["settings"])]
    if not length:
        trees = [tree | {"train": _without_length(tree["train"])} for tree in trees]
    if odd := real.apart(*trees):
        raise FedVLMError(
            f"'{where}' holds runs with other settings: {', '.join(odd)}. Choose another folder "
            "with --output DIR"
        )


def _without_length(train: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in train.items() if k not in LENGTH}

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
    cell = real.Real(_cell(config, folder), _settings(config), config.train.lr)
    where = output / real.FOLDER / cell.cell.name
    _check(cell, where / real.CELL)
    name = config.algorithm.name
    arm = TUNED if name == "lora" and config.train.tuning else name
    target = where / f"{arm}-{config.train.lr:g}-seed-{config.seed}" / runs.MEASURED
    if target.exists():
        return False
    if not (where / real.CELL).exists():
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


def _check(cell: real.Real, path: Path) -> None:
    """Refuses a run of other settings; rounds and tuning may differ, and show as steps."""
    if not path.exists():
        return
    there = json.loads(path.read_text(encoding="utf-8"))["settings"]
    if odd := real.apart(*(_without_length(tree) for tree in (there, cell.told["settings"]))):
        raise FedVLMError(
            f"'{path.parent}' holds runs with other settings: {', '.join(odd)}. Choose another "
            "folder with --output DIR"
        )


def _without_length(tree: Mapping[str, Any]) -> dict[str, Any]:
    train = {k: v for k, v in tree["train"].items() if k not in LENGTH}
    return {**tree, "train": train}

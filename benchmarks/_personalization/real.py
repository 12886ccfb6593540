"""Real cells of the personalization benchmark: any data and any model of the user's.

A real cell is named by its data, the column of its clients, its model, and its training rows a
client: `vqarad-site6-smol-100`. All algorithms have one learning rate, which the user gives. The
file `cell.json` in the folder of a cell holds its settings, without the places of data and model.
So the tables need neither of them, and results can be published.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from _personalization import cells, plan
from _personalization.cells import Cell, merged
from _personalization.runs import MEASURED, Job
from fedvlm.algorithms.table import taken
from fedvlm.config import load
from fedvlm.errors import FedVLMError
from fedvlm.settings.sections import Config
from fedvlm.store.files import write_text

FOLDER, CELL = "real", "cell.json"
TEST = 40  # rows of a client for scores
LEAST = 8  # training rows of a client, on average
METRIC = "token_f1"
"""Accuracy without regard to case for answers of one word, such as yes and no."""
SMALL: dict[str, Any] = {
    "train": {"local_steps": 5, "batch_size": 4},
    "aggregate": {"kind": "mean"},
    "eval": {"every": 0, "max_rows": TEST, "max_new_tokens": 8, "metric": METRIC},
    "engine": {"threads": 1},
}
"""The form for two CPU cores."""
ROUNDS = 8
SEEDS = (0, 1)
SECONDS_A_STEP = 1.5  # of one client on smol with evaluations; the guess before the first run


@dataclass(frozen=True)
class Real:
    """A real cell that the user asked for.

    Attributes:
        cell: the cell of its results.
        tree: the settings of its runs, without algorithm, rate and seed.
        rate: learning rate of all algorithms.
    """

    cell: Cell
    tree: Mapping[str, Any]
    rate: float

    @property
    def told(self) -> dict[str, Any]:
        """The content of `cell.json`."""
        tree = merged(self.tree, {"train": {"lr": self.rate}})
        tree["data"]["path"] = Path(tree["data"]["path"]).name
        tree["model"]["name"] = Path(tree["model"]["name"]).name
        cell = {"regime": self.cell.regime, "strength": None, "rows_per_client": self.cell.rows}
        found: dict[str, Any] = json.loads(json.dumps({**cell, "settings": tree}))
        return found


@dataclass(frozen=True)
class RealJob(Job):
    """A run in a real cell. Its field `extra` holds all settings."""

    @cached_property
    def config(self) -> Config:
        """The settings of the run."""
        tree = merged(self.extra, cells.OWN.get(self.algorithm, {}))
        tree = merged(tree, {"train": self._rounds() | {"lr": self.rate}})
        name = "lora" if self.algorithm == cells.TUNED else self.algorithm
        tree["algorithm"] = taken(name, tree.get("algorithm", {}))
        return load(tree | {"seed": self.seed, "output": str(self.folder)})

    def _rounds(self) -> dict[str, int]:
        """Rounds, and steps of local tuning: a sixth of all steps for the tuned arm."""
        train = self.extra["train"]
        tuned = -(-train["rounds"] // 6) if self.algorithm == cells.TUNED else 0
        return {
            "rounds": train["rounds"] - tuned,
            "finish_steps": tuned * train["local_steps"],
        }

    @property
    def steps(self) -> int:
        """Optimizer steps of all clients together, as if there were as many as in other cells."""
        return cells.SITES * self.extra["train"]["rounds"] * self.extra["train"]["local_steps"]


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a real cell."""
    group = parser.add_argument_group("a real cell", "runs this cell only")
    group.add_argument("--data", help="parquet, JSONL, image folder or hub data set")
    group.add_argument("--by", help="column of the data that tells the clients apart")
    group.add_argument("--model", help="'tiny', a hub name or a folder")
    group.add_argument("--rate", type=float, help="learning rate of all algorithms")
    group.add_argument("--rows", type=int, help="training rows a client, on average; default: all")
    group.add_argument("--rounds", type=int, help=f"rounds of 5 steps; default: {ROUNDS}")
    group.add_argument("--target", help="lora.target; default: language")
    group.add_argument(
        "--take",
        action="append",
        default=[],
        metavar="FOLDER",
        help="instead of running: the finished runs of a folder of fedvlm compare",
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting of a run"
    )


def asked(found: argparse.Namespace) -> Real | None:
    """The real cell of the options. Reads the rows of the data, to count them and the clients.

    Returns:
        The cell; None without `--data`.

    Raises:
        FedVLMError: an option is missing or has no meaning, or there are too few rows.
    """
    names = ("by", "model", "rate", "rows", "rounds", "target", "set")
    if found.data is None:
        odd = [f"--{name}" for name in names if getattr(found, name) not in (None, [])]
        if odd:
            raise FedVLMError(f"{', '.join(odd)}: no meaning without --data")
        return None
    if found.rounds is not None and found.rounds < 2:
        raise FedVLMError(f"--rounds has to be at least 2 (got {found.rounds})")
    missing = [f"--{name}" for name in names[:3] if getattr(found, name) is None]
    if missing:
        raise FedVLMError(f"--data needs {', '.join(missing)} as well")
    tree = merged(
        SMALL,
        {
            "model": {"name": _absolute(found.model)},
            "data": {"path": _absolute(found.data)},
            "partition": {"kind": "column", "column": found.by, "min_rows": 4},
            "lora": {"target": found.target or "language"},
            "train": {"rounds": found.rounds or ROUNDS},
        },
    )
    config = load(tree, *found.set, inputs=True)
    chosen = config.model_dump(exclude_unset=True)
    tree = {name: chosen[name] for name in chosen if name not in ("output", "seed", "algorithm")}
    sites, average = _counted(config)
    held = cells.VALIDATION + TEST
    most = int(average) - held
    train = most if found.rows is None else found.rows
    if not LEAST <= train <= most:
        raise FedVLMError(
            f"'{found.data}' has {average:.0f} rows a client: {cells.VALIDATION} for validation, "
            f"{TEST} for the test, and {max(most, 0)} to train. --rows has to be {LEAST} to "
            f"{max(most, 0)} (got {train}); a column with fewer values gives more"
        )
    total = average if found.rows is None else train + held
    shares = {"val_fraction": cells.VALIDATION / total, "test_fraction": TEST / total}
    some = {} if found.rows is None else {"max_rows": round(sites * total)}
    regime = f"{Path(found.data).stem}-{found.by}-{Path(found.model).name}"
    cell = Cell(regime, None, train)
    return Real(cell, merged(tree, {"data": shares | some}), found.rate)


def _counted(config: Config) -> tuple[int, float]:
    """The number of clients, and their average number of rows."""
    from fedvlm.data.sources import load_rows

    by = config.partition.column
    assert by is not None
    rows = load_rows(config.data, config.seed, by=by)
    if by not in rows.column_names:
        raise FedVLMError(f"--by {by}: the data has no such column; it has {rows.column_names}")
    sites = {value for value in rows[by] if value is not None}
    return len(sites), len(rows) / len(sites)


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def jobs(real: Real, algorithms: Sequence[str], seeds: Sequence[int], output: Path) -> list[Job]:
    """The runs of a real cell, seed by seed."""
    where = output / FOLDER / real.cell.name
    return [
        RealJob(
            real.cell,
            name,
            real.rate,
            seed,
            where / f"{name}-{real.rate:g}-seed-{seed}",
            real.tree,
        )
        for seed in seeds
        for name in algorithms
    ]


def keep(real: Real, output: Path, *, dry: bool = False) -> None:
    """Writes the settings of a cell into its folder; ``dry``: only checks them.

    Raises:
        FedVLMError: the folder holds results of other settings.
    """
    path = output / FOLDER / real.cell.name / CELL
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if odd := apart(found["settings"], real.told["settings"]):
            raise FedVLMError(
                f"'{path.parent}' holds runs with other settings: {', '.join(odd)}. Ask for the "
                "same, or choose another folder with --output DIR"
            )
    elif not dry:
        write_text(path, json.dumps(real.told, indent=1) + "\n")


def apart(there: Mapping[str, Any], here: Mapping[str, Any], head: str = "") -> list[str]:
    """The leaves in which two trees of settings differ, as text."""
    found = []
    for key in sorted(there.keys() | here.keys()):
        one, other = there.get(key), here.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += apart(one, other, f"{head}{key}.")
        elif one != other:
            found.append(f"{head}{key} is {one} there, and {other} was asked for")
    return found


def rows(output: Path) -> list[dict[str, Any]]:
    """The raw results of all real cells in an output folder."""
    found: list[dict[str, Any]] = []
    for cell, folder, settings in _cells(output):
        for path in sorted(folder.glob(f"*/{MEASURED}")):
            name, _, seed = path.parent.name.rpartition("-seed-")
            algorithm = name.rpartition(f"-{settings['train']['lr']:g}")[0]
            measured = json.loads(path.read_text(encoding="utf-8"))
            metric = settings["eval"]["metric"]
            found += plan.rows_of(cell, algorithm, int(seed), measured, metric)
    return plan.ordered(found)


def stated(output: Path) -> str:
    """A sentence a cell about its settings."""
    lines = []
    for cell, folder, tree in _cells(output):
        found = [
            json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"*/{MEASURED}")
        ]
        if not found:
            continue
        dates, commits = (sorted({one[key] for one in found}) for key in ("date", "commit"))
        train, score = tree["train"], tree["eval"]
        lines.append(
            f"- {cell.name}: `{tree['data']['path']}` by `{tree['partition']['column']}`, model "
            f"`{tree['model']['name']}`, LoRA on `{tree['lora']['target']}`, "
            f"{train['rounds']} rounds of {train['local_steps'] or 5} steps, batches of "
            f"{train['batch_size']}, learning rate "
            f"{train['lr']:g} for all algorithms, not tuned; score: {score['metric']} on up to "
            f"{score['max_rows']} rows a client. {len(found)} runs, "
            f"measured on {', '.join(dates)}, commit {', '.join(commits)}."
        )
    return "\n".join(lines)


def _cells(output: Path) -> Iterator[tuple[Cell, Path, dict[str, Any]]]:
    for path in sorted(output.glob(f"{FOLDER}/*/{CELL}")):
        told = json.loads(path.read_text(encoding="utf-8"))
        cell = Cell(told["regime"], told["strength"], told["rows_per_client"])
        yield cell, path.parent, told["settings"]

"""Real cells of the personalization benchmark: any data and any model of the user's.

A real cell is named by its data, the column of its clients, its model, and its training rows a
client: `vqarad-site6-smol-100`. The user gives one learning rate for all algorithms, or several.
Of several, validation rows choose one for each algorithm, with seed 0. The file `cell.json` in the
folder of a cell holds its settings and the chosen rates, without the places of data and model. So
the tables need neither of them, and results can be published.
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
from _personalization.runs import MEASURED, Job, read
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
        rates: one learning rate for all algorithms, or the candidates of each.
    """

    cell: Cell
    tree: Mapping[str, Any]
    rates: tuple[float, ...]

    @property
    def told(self) -> dict[str, Any]:
        """The content of `cell.json`."""
        rates = self.rates[0] if len(self.rates) == 1 else self.rates
        tree = merged(self.tree, {"train": {"lr": rates}})
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
    group.add_argument(
        "--rate",
        type=_rates,
        help="learning rate of all algorithms; of several, such as 0.001,0.002, validation rows of "
        "seed 0 choose one for each algorithm",
    )
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


def _rates(text: str) -> tuple[float, ...]:
    found = tuple(sorted({float(part) for part in text.split(",")}))
    if found[0] <= 0:
        raise argparse.ArgumentTypeError(f"a learning rate is above 0 (got {found[0]:g})")
    return found


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


def _folder(real: Real, output: Path) -> Path:
    """The folder of a cell."""
    return output / FOLDER / real.cell.name


def tuning(real: Real, algorithms: Sequence[str], output: Path) -> list[Job]:
    """The runs that choose a rate; none where there is one rate, or a rate is chosen already."""
    if len(real.rates) == 1:
        return []
    where, kept = _folder(real, output), chosen(real, output)
    tree = merged(real.tree, plan.TUNING)
    return [
        RealJob(
            real.cell,
            name,
            rate,
            plan.TUNING_SEED,
            where / "tuning" / f"{name}-{rate:g}",
            tree,
        )
        for name in algorithms
        if name not in kept
        for rate in real.rates
    ]


def choose(real: Real, algorithms: Sequence[str], output: Path) -> None:
    """Writes the rate of each algorithm whose tuning is complete into `cell.json`."""
    found: dict[str, list[tuple[float, dict[str, Any] | None]]] = {}
    for job in tuning(real, algorithms, output):
        found.setdefault(job.algorithm, []).append((job.rate, read(job)))
    rates = {name: plan.best(tried) for name, tried in found.items()}
    best = {name: rate for name, rate in rates.items() if rate is not None}
    if best:
        path = _folder(real, output) / CELL
        told = json.loads(path.read_text(encoding="utf-8"))
        told["rates"] = dict(sorted((told.get("rates", {}) | best).items()))
        write_text(path, json.dumps(told, indent=1) + "\n")


def chosen(real: Real, output: Path) -> dict[str, float]:
    """The rates that were chosen earlier."""
    path = _folder(real, output) / CELL
    if not path.exists():
        return {}
    rates: dict[str, float] = json.loads(path.read_text(encoding="utf-8")).get("rates", {})
    return rates


def jobs(real: Real, algorithms: Sequence[str], seeds: Sequence[int], output: Path) -> list[Job]:
    """The compared runs of a real cell, seed by seed; an algorithm without a rate has none."""
    where, rates = _folder(real, output), chosen(real, output)
    if len(real.rates) == 1:
        rates = dict.fromkeys(algorithms, real.rates[0])
    return [
        RealJob(
            real.cell,
            name,
            rates[name],
            seed,
            where / f"{name}-{rates[name]:g}-seed-{seed}",
            real.tree,
        )
        for seed in seeds
        for name in algorithms
        if name in rates
    ]


def keep(real: Real, output: Path, *, dry: bool = False) -> None:
    """Writes the settings of a cell into its folder; ``dry``: only checks them.

    Runs of one rate stay where several rates are asked for that include it.

    Raises:
        FedVLMError: the folder holds results of other settings.
    """
    path = _folder(real, output) / CELL
    told = real.told
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        wider = found["settings"]["train"]["lr"] in real.rates and len(real.rates) > 1
        there = merged(found["settings"], {"train": {"lr": told["settings"]["train"]["lr"]}})
        if odd := apart(there if wider else found["settings"], told["settings"]):
            raise FedVLMError(
                f"'{path.parent}' holds runs with other settings: {', '.join(odd)}. Ask for the "
                "same, or choose another folder with --output DIR"
            )
        if not wider:
            return
    if not dry:
        write_text(path, json.dumps(told, indent=1) + "\n")


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
    for cell, folder, told in _cells(output):
        metric = told["settings"]["eval"]["metric"]
        for algorithm, seed, measured in _measured(folder, told):
            found += plan.rows_of(cell, algorithm, seed, measured, metric)
    return plan.ordered(found)


def _measured(folder: Path, told: Mapping[str, Any]) -> list[tuple[str, int, dict[str, Any]]]:
    """Algorithm, seed and measurements of the compared runs, at the chosen rates."""
    rate, rates, found = told["settings"]["train"]["lr"], told.get("rates", {}), []
    for path in sorted(folder.glob(f"*/{MEASURED}")):
        head, _, seed = path.parent.name.rpartition("-seed-")
        names = rates.items() if isinstance(rate, list) else [(n, rate) for n in cells.ALGORITHMS]
        for name in (name for name, own in names if head == f"{name}-{own:g}"):
            found.append((name, int(seed), json.loads(path.read_text(encoding="utf-8"))))
    return found


def stated(output: Path) -> str:
    """A sentence a cell about its settings."""
    lines = []
    for cell, folder, told in _cells(output):
        found, tree = [one for *_, one in _measured(folder, told)], told["settings"]
        if not found:
            continue
        dates, commits = (sorted({one[key] for one in found}) for key in ("date", "commit"))
        train, score = tree["train"], tree["eval"]
        lines.append(
            f"- {cell.name}: `{tree['data']['path']}` by `{tree['partition']['column']}`, model "
            f"`{tree['model']['name']}`, LoRA on `{tree['lora']['target']}`, "
            f"{train['rounds']} rounds of {train['local_steps'] or 5} steps, batches of "
            f"{train['batch_size']}, {_of_rates(train['lr'], told.get('rates', {}))}; score: "
            f"{score['metric']} on up to "
            f"{score['max_rows']} rows a client. {len(found)} runs, "
            f"measured on {', '.join(dates)}, commit {', '.join(commits)}."
        )
    return "\n".join(lines)


def _of_rates(rates: float | Sequence[float], best: Mapping[str, float]) -> str:
    if isinstance(rates, float):
        return f"learning rate {rates:g} for all algorithms, not tuned"
    each = ", ".join(f"`{name}` {rate:g}" for name, rate in best.items())
    return f"learning rates by validation rows of seed 0 from {', '.join(map(str, rates))}: {each}"


def _cells(output: Path) -> Iterator[tuple[Cell, Path, dict[str, Any]]]:
    for path in sorted(output.glob(f"{FOLDER}/*/{CELL}")):
        told = json.loads(path.read_text(encoding="utf-8"))
        cell = Cell(told["regime"], told["strength"], told["rows_per_client"])
        yield cell, path.parent, told

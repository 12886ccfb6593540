"""The runs of the personalization benchmark, its choice of learning rates, and its time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _personalization import cells
from _personalization.cells import Cell
from _personalization.record import Rates, read_rates
from _personalization.runs import Job, read

COLUMNS = (
    "regime",
    "strength",
    "rows_per_client",
    "algorithm",
    "seed",
    "model",
    "when",
    "mean",
    "worst10",
    "steps",
    "passes",
    "bytes_up",
    "rounds_to_90",
    "seconds",
    "clients",
    "rows",
)
TUNING: dict[str, Any] = {"eval": {"split": "val", "every": 0}}
TUNING_SEED = 0
SECONDS_A_STEP = 0.06  # of one client with evaluations; the guess before the first measurement


@dataclass(frozen=True)
class Form:
    """The benchmark, or a part of it.

    Attributes:
        cells: the compared cells.
        algorithms: the compared algorithms.
        seeds: seeds of rows, partitions, weights and batches.
        extra: settings that replace settings of the benchmark.
        rate: learning rate of all algorithms, without tuning; None: tuned.
    """

    cells: tuple[Cell, ...]
    algorithms: tuple[str, ...] = cells.ALGORITHMS
    seeds: tuple[int, ...] = tuple(range(cells.SEEDS))
    extra: Mapping[str, Any] = field(default_factory=dict)
    rate: float | None = None


def whole() -> Form:
    """The whole benchmark."""
    return Form(tuple(cells.full()))


def main() -> Form:
    """The default part."""
    return _part(cells.MAIN)


def small() -> Form:
    """The part of `--small`. Its settings are the same, so larger parts reuse its runs."""
    return _part(cells.SMALL)


def _part(named: Mapping[str, tuple[Any, ...]]) -> Form:
    known = {cell.name: cell for cell in cells.full()}
    chosen = tuple(known[name] for name in named["cells"])
    return Form(chosen, named["algorithms"], named["seeds"])


def quick() -> Form:
    """A test of the script. Its scores mean nothing."""
    extra = {
        "train": {"rounds": 2, "local_steps": 2},
        "eval": {"every": 1, "max_rows": 4, "max_new_tokens": 8},
        "data": {"scenes": {"sites": 3}},
        "lora": {"rank": 2, "alpha": 4},
    }
    return Form((Cell("iid", 0.0, 24),), ("auto", "lora"), (0,), extra, rate=0.002)


def tuning(form: Form, output: Path) -> Iterator[Job]:
    """The runs that choose learning rates: three an algorithm and kind of regime, one seed.

    Algorithms with a chosen rate are left out.
    """
    if form.rate is not None:
        return
    kept = read_rates(output)
    for kind in dict.fromkeys(cells.kind(cell) for cell in form.cells):
        for algorithm in form.algorithms:
            if (kind, algorithm) not in kept:
                yield from (job for _, job in _candidates(form, kind, algorithm, output))


def _candidates(form: Form, kind: str, algorithm: str, output: Path) -> Iterator[tuple[float, Job]]:
    cell = cells.TUNED_ON[kind]
    extra = cells.merged(form.extra, TUNING)
    for rate in cells.rates(algorithm):
        folder = output / "tuning" / cell.name / f"{algorithm}-{rate:g}"
        yield rate, Job(cell, algorithm, rate, TUNING_SEED, folder, extra)


def chosen(form: Form, output: Path) -> dict[tuple[str, str], float]:
    """The learning rates of the highest validation score. Of equal scores the lower loss decides.

    A rate chosen earlier stays.
    """
    found, kept = {}, read_rates(output)
    for kind in dict.fromkeys(cells.kind(cell) for cell in form.cells):
        for algorithm in form.algorithms:
            if form.rate is not None:
                found[kind, algorithm] = form.rate
                continue
            if (kind, algorithm) in kept:
                found[kind, algorithm] = kept[kind, algorithm]
                continue
            tried = [(r, read(job)) for r, job in _candidates(form, kind, algorithm, output)]
            if (rate := best(tried)) is not None:
                found[kind, algorithm] = rate
    return found


def best(tried: Sequence[tuple[float, Mapping[str, Any] | None]]) -> float | None:
    """The rate whose run has the most merit; None while a run is missing."""
    if not all(record for _, record in tried):
        return None
    return max(tried, key=lambda pair: merit(pair[1]))[0]


def merit(record: Mapping[str, Any] | None) -> tuple[float, float]:
    """The validation score of a run, and then the lower loss."""
    assert record is not None
    return personal(record)["mean"], -record["loss"]


def personal(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the personal models at the end."""
    return next(r for r in record["rows"] if (r["model"], r["when"]) == ("personal", "after"))


def runs(form: Form, rates: Rates, output: Path) -> Iterator[Job]:
    """The compared runs whose learning rate is known, seed by seed over all cells."""
    for seed in form.seeds:
        for cell in form.cells:
            joins = cell.regime.startswith(cells.JOINED)
            for algorithm in form.algorithms:
                rate = rates.get((cells.kind(cell), algorithm))
                if rate is None or (joins and algorithm in cells.REFERENCES):
                    continue
                folder = output / "runs" / cell.base.name / f"{algorithm}-{rate:g}-seed-{seed}"
                yield Job(cell, algorithm, rate, seed, folder, form.extra)


def rows(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """The raw results of the finished jobs."""
    found = []
    for job in jobs:
        if record := read(job):
            found += rows_of(job.cell, job.algorithm, job.seed, record, job.config.metric)
    return ordered(found)


def rows_of(
    cell: Cell, algorithm: str, seed: int, record: Mapping[str, Any], metric: str
) -> list[dict[str, Any]]:
    """The raw results of a run.

    Beside :data:`COLUMNS`, a row holds `metric`, the name of its score, and `scores`: the scores of
    each client's personal model.
    """
    clients = record["clients"]
    run = {
        "regime": cell.regime,
        "strength": cell.strength,
        "rows_per_client": cell.rows,
        "algorithm": algorithm,
        "seed": seed,
        "seconds": record["seconds"],
        "clients": len(clients),
        "rows": int(sum(own["examples"] for own in clients.values())),
        "metric": metric,
        "scores": clients,
    }
    return [run | row for row in record["rows"]]


def ordered(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Raw results by cell, algorithm and seed."""
    return sorted(found, key=_order)


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    strength = -1.0 if row["strength"] is None else row["strength"]
    names = list(dict.fromkeys(cell.regime for cell in cells.full()))
    known = names.index(row["regime"]) if row["regime"] in names else len(names)
    place = known, row["regime"], strength, row["rows_per_client"]
    return *place, cells.ALGORITHMS.index(row["algorithm"]), row["seed"]


def seconds(
    todo: Iterable[Job], done: Iterable[tuple[Job, float]], guess: float = SECONDS_A_STEP
) -> float:
    """Estimates the seconds of jobs that run one after another.

    The estimate uses the median time of a step in the same cell, or in all cells.

    Args:
        todo: the remaining jobs.
        done: finished jobs and their seconds.
        guess: seconds of a step, where no job is finished.
    """
    found: dict[tuple[str, bool] | None, list[float]] = {}
    for job, taken in done:
        for key in (_alike(job), None):
            found.setdefault(key, []).append(taken / job.steps)
    usual = statistics.median(found.get(None, [guess]))
    typical = {key: statistics.median(each) for key, each in found.items()}
    return sum(typical.get(_alike(job), usual) * job.steps for job in todo)


def _alike(job: Job) -> tuple[str, bool]:
    return job.cell.base.name, job.tunes


def number_of_runs(form: Form) -> tuple[int, int]:
    """The number of runs that choose rates, and of compared runs. Clients that join add none."""
    anywhere, rates = (
        Path("x"),
        dict.fromkeys(((cells.kind(c), a) for c in form.cells for a in form.algorithms), 0.003),
    )
    trained = {job.folder for job in runs(form, rates, anywhere)}
    return sum(1 for _ in tuning(form, anywhere)), len(trained)

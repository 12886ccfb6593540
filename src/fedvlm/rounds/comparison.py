"""compare(): several algorithms on the same partitions and the same initial weights."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvlm import config as configs
from fedvlm.algorithms.table import TABLE, meaningful
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.metrics import mean, standard_error
from fedvlm.rounds.progress import Progress
from fedvlm.rounds.results import Results
from fedvlm.settings.sections import Config
from fedvlm.store import files
from fedvlm.store import run as stores

BASELINES = ("lora", "lora+ft")
Event = tuple[str, dict[str, Any], float]
Tell = Callable[[Event], None]
Work = Callable[[str, Config, Tell], None]


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        folder: where everything is; one run's folder each in ``ALGORITHM-seed-N``.
        rows: one dict per algorithm, best first; the columns of ``comparison.csv``.
    """

    folder: Path
    rows: list[dict[str, Any]]


def compare(
    algorithms: Sequence[str],
    config: str | Path | dict[str, Any] | Config | None = None,
    *overrides: str,
    seeds: int = 1,
    jobs: int = 1,
    tell: Tell | None = None,
) -> Comparison:
    """Runs every algorithm with every seed; what was done before is skipped, or gone on with.

    For one seed, all algorithms get the same rows, clients, splits, cohorts, batches and initial
    adapter.

    Args:
        algorithms: names from the table.
        config: as for :func:`fedvlm.run`; ``output`` is the folder of the comparison.
        *overrides: dotted assignments.
        seeds: seeds ``config.seed``, ``config.seed + 1``, ...
        jobs: runs at a time, each in a process of its own with one thread.
        tell: called with (run, metrics line, seconds) after every round.

    Raises:
        FedVLMError: as :func:`fedvlm.run`; or the folder holds other runs.
    """
    base = configs.load(config, *overrides)
    runs = _runs(base, algorithms, seeds, jobs)
    if stores.is_run(base.output):
        raise FedVLMError(
            f"output: '{base.output}' holds a single run; choose another folder with output=DIR"
        )
    each(run_one, {name: c for name, c in runs.items() if not done(c)}, jobs, tell)
    return _conclude(Path(base.output), algorithms, runs)


def each(work: Work, runs: Mapping[str, Config], jobs: int = 1, tell: Tell | None = None) -> None:
    """Does a piece of work, such as :func:`run_one`, for every run, ``jobs`` at a time.

    Image features that no run changes are computed by the first and handed on, in each process.

    Args:
        work: called with a run's name, its settings, and where to tell its rounds; with several
            jobs it is done in other processes, of one thread each, which have to be able to import
            it.
        runs: name -> settings.
        jobs: pieces at a time.
        tell: called with (run, metrics line, seconds) after every round.
    """
    tell = tell or (lambda event: None)
    if jobs == 1:
        from fedvlm.models.frozen import handed_on

        with handed_on():
            for name, c in runs.items():
                work(name, c, tell)
    elif runs:
        _in_processes(work, runs, jobs, tell)


def _runs(base: Config, algorithms: Sequence[str], seeds: int, jobs: int) -> dict[str, Config]:
    problems = []
    if seeds < 1 or jobs < 1:
        problems.append(f"seeds and jobs must be at least 1, got {seeds} and {jobs}")
    if not algorithms:
        problems.append(f"name the algorithms to compare; there are {', '.join(TABLE)}")
    runs = {}
    for seed in range(base.seed, base.seed + seeds):
        for name in algorithms:
            tree = base.model_dump()
            if name in TABLE:
                tree["algorithm"] = meaningful(name, tree["algorithm"])
                for key in ("ranks", "spare"):
                    if f"lora.{key}" not in TABLE[name].settings:
                        tree["lora"][key] = None
            tree["algorithm"]["name"] = name
            tree["seed"] = seed
            tree["output"] = str(Path(base.output) / f"{name}-seed-{seed}")
            if jobs > 1:
                tree["engine"]["threads"] = 1
            try:
                runs[f"{name} seed {seed}"] = configs.load(tree)
            except ConfigError as error:
                problems.extend(p for p in error.problems if p not in problems)
    if problems:
        raise ConfigError(problems)
    return runs


def done(config: Config) -> bool:
    """Whether a run is finished.

    Raises:
        FedVLMError: its folder holds a run with other settings.
    """
    if not stores.is_run(config.output):
        return False
    there = configs.load(Path(config.output) / stores.CONFIG)
    same = {"output": "", "engine": config.engine}
    if there.model_copy(update=same) != config.model_copy(update=same):
        raise FedVLMError(
            f"output: '{config.output}' holds a run with other settings; choose another folder "
            "with output=DIR, or remove that one"
        )
    return stores.is_done(config.output)


class _Relay(Progress):
    """Passes a run's rounds on under the run's name."""

    def __init__(self, name: str, tell: Tell):
        self.name, self.tell = name, tell

    def round(self, line: dict[str, Any], seconds: float) -> None:
        self.tell((self.name, line, seconds))


def run_one(name: str, config: Config, tell: Tell) -> None:
    """Does a run, or goes on with it."""
    from fedvlm.rounds.federate import resume, run

    progress = _Relay(name, tell)
    if stores.is_run(config.output):
        resume(config.output, progress)
    else:
        run(config, progress=progress)


def _in_processes(work: Work, runs: Mapping[str, Config], jobs: int, tell: Tell) -> None:
    import multiprocessing
    import threading
    from multiprocessing.managers import SyncManager

    spawn = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=spawn)
    manager.start(_ends_with_its_parent)
    with manager, _pool(jobs, spawn) as pool:
        events = manager.Queue()

        def forward() -> None:
            while (event := events.get()) is not None:
                tell(event)

        listener = threading.Thread(target=forward, daemon=True)
        listener.start()
        futures = [pool.submit(work, n, c, events.put) for n, c in runs.items()]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            events.put(None)
            listener.join()


@contextlib.contextmanager
def _pool(jobs: int, context: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool that stops at once on an error or Ctrl-C; unfinished runs can be gone on with."""
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_run)
    try:
        yield pool
    except BaseException:
        for process in (pool._processes or {}).values():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _one_run() -> None:
    import os

    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    _ends_with_its_parent()

    from fedvlm.models.frozen import hand_on

    hand_on()


def _ends_with_its_parent() -> None:
    """Ctrl-C is for the parent to decide on; when that dies, however, this process ends."""
    import multiprocessing
    import os
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _conclude(folder: Path, algorithms: Sequence[str], runs: dict[str, Config]) -> Comparison:
    from fedvlm.figures.plots import plot_comparison

    results: dict[str, list[Results]] = {name: [] for name in algorithms}
    for config in runs.values():
        results[config.algorithm.name].append(Results.read(config.output))
    rows = sorted(
        (_row(name, found) for name, found in results.items()), key=lambda r: -r["personal"]
    )
    by_name = {row["algorithm"]: row["personal"] for row in rows}
    for row in rows:
        for baseline in BASELINES:
            reference = by_name.get(baseline)
            row[f"gain_over_{baseline}"] = row["personal"] / reference - 1 if reference else None
    lines = {
        name: [files.read_lines(r.folder / "metrics.jsonl") for r in found]
        for name, found in results.items()
    }
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(folder / "comparison.csv", out.getvalue())
    files.write_text(folder / "comparison.json", json.dumps(rows, indent=2) + "\n")
    plot_comparison(lines, folder / "comparison.png", _title(runs), metric=rows[0]["metric"])
    return Comparison(folder, rows)


def _row(name: str, found: Sequence[Results]) -> dict[str, Any]:
    personal = [r.summary("personal")["mean"] for r in found]
    timing = [files.read_lines(r.folder / "timing.jsonl") for r in found]
    return {
        "algorithm": name,
        "seeds": len(found),
        "metric": found[0].metric,
        "personal": mean(personal),
        "standard_error": standard_error(personal) if len(found) > 1 else None,
        "worst10": mean([r.summary("personal")["worst10"] for r in found]),
        "spread": mean([r.summary("personal")["std"] for r in found]),
        "personal_before": mean([r.summary("personal_before")["mean"] for r in found]),
        "global": mean([r.summary("global")["mean"] for r in found]),
        "untuned": mean([r.summary("untuned")["mean"] for r in found]),
        "bytes_up": mean([r.table["bytes"]["bytes_up"]["total"] for r in found]),
        "bytes_down": mean([r.table["bytes"]["bytes_down"]["total"] for r in found]),
        "seconds": mean([sum(line.get("seconds", 0.0) for line in t) for t in timing]),
    }


def _title(runs: dict[str, Config]) -> str:
    from fedvlm.rounds.progress import source

    config = next(iter(runs.values()))
    seeds = len({c.seed for c in runs.values()})
    return f"{source(config)}, {seeds} seed{'s' if seeds > 1 else ''}"

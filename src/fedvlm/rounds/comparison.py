"""compare(): several algorithms on the same partitions and the same initial weights."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvlm import config as configs
from fedvlm.algorithms.base import Algorithm
from fedvlm.algorithms.table import ALIASES, OWN, find, names, taken
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
Compared = str | tuple[str, Algorithm]


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        folder: the folder of the comparison; the runs are in its folders ``ALGORITHM-seed-N``.
        rows: one dict per algorithm, best first, with the columns of ``comparison.csv``.
    """

    folder: Path
    rows: list[dict[str, Any]]


def compare(
    algorithms: Sequence[Compared],
    config: configs.Source = None,
    *overrides: str,
    seeds: int = 1,
    jobs: int = 1,
    tell: Tell | None = None,
) -> Comparison:
    """Runs every algorithm with every seed; finished runs are skipped, unfinished ones continued.

    For one seed, all algorithms get the same rows, clients, splits, cohorts, batches and initial
    adapter. A setting of the section ``algorithm`` applies to the algorithms that have it.

    Args:
        algorithms: names, see ``fedvlm algorithms``; or objects, as ``(label, algorithm)``.
        config: as for :func:`fedvlm.run`; ``output`` is the folder of the comparison.
        *overrides: dotted assignments.
        seeds: number of seeds: ``config.seed``, ``config.seed + 1``, ...
        jobs: runs at a time, each in its own process with one thread. Objects need jobs=1, because
            they do not cross processes.
        tell: called with (run, metrics line, seconds) after every round.

    Raises:
        FedVLMError: as :func:`fedvlm.run`; or the folder holds other runs.
    """
    runs = planned(algorithms, config, *overrides, seeds=seeds, jobs=jobs)
    objects = dict(a for a in algorithms if not isinstance(a, str))
    folder = Path(next(iter(runs.values())).output).parent
    if stores.is_run(folder):
        raise FedVLMError(
            f"output: '{folder}' holds a single run; choose another folder with output=DIR"
        )
    left = {name: c for name, c in runs.items() if not done(c)}
    work: Work = run_one
    if objects:

        def work(name: str, config: Config, tell: Tell) -> None:
            run_one(name, config, tell, objects.get(_label(config)))

    each(work, left, jobs, tell)
    return _conclude(folder, runs)


def planned(
    algorithms: Sequence[Compared],
    config: configs.Source = None,
    *overrides: str,
    seeds: int = 1,
    jobs: int = 1,
) -> dict[str, Config]:
    """The runs of a comparison: name -> settings; see :func:`compare`.

    Raises:
        ConfigError: lists the mistakes of all runs.
    """
    tree, problems = configs.read(config, *overrides)
    objects = dict(a for a in algorithms if not isinstance(a, str))
    labels = [ALIASES.get(a, a) if isinstance(a, str) else a[0] for a in algorithms]
    return _runs(tree, list(dict.fromkeys(labels)), objects, seeds, jobs, problems)


def each(work: Work, runs: Mapping[str, Config], jobs: int = 1, tell: Tell | None = None) -> None:
    """Calls ``work``, such as :func:`run_one`, for every run, ``jobs`` at a time.

    In each process, the first run computes the image features that no run changes, and the
    following runs reuse them.

    Args:
        work: called with a run's name, its settings, and a function that gets its rounds. With
            several jobs it runs in other processes of one thread each, which must be able to
            import it.
        runs: name -> settings.
        jobs: runs at a time.
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


def _runs(
    tree: dict[str, Any],
    labels: Sequence[str],
    objects: Mapping[str, Algorithm],
    seeds: int,
    jobs: int,
    problems: list[str],
) -> dict[str, Config]:
    if seeds < 1 or jobs < 1:
        problems.append(f"seeds and jobs must be at least 1, got {seeds} and {jobs}")
    if not labels:
        problems.append(f"no algorithm is named; choose from {', '.join(names())}")
    if objects and jobs > 1:
        problems.append(
            f"jobs={jobs}: {', '.join(objects)} is an object, which cannot go to another process; "
            "set jobs=1, or install it as an entry point of the group 'fedvlm.algorithms'"
        )
    for label in objects:
        if not re.fullmatch(r"[\w.+-]+", label) or label in names():
            problems.append(
                f"'{label}' is no label for an object: use letters, digits and . + - _, and no "
                "name of a known algorithm"
            )
    problems += _nobodys(tree, [x for x in labels if x not in objects])
    first, runs = tree.get("seed") or 0, {}
    for seed in range(first, first + seeds) if isinstance(first, int) else [first]:
        for label in labels:
            own = _settings(tree, label, label in objects)
            own |= {"seed": seed, "output": _folder(tree, label, seed)}
            if jobs > 1:
                own["engine"] = {**(own.get("engine") or {}), "threads": 1}
            try:
                runs[f"{label} seed {seed}"] = configs.checked(own)
            except ConfigError as error:
                problems.extend(p for p in error.problems if p not in problems)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return runs


def _label(config: Config) -> str:
    """The name of a run's algorithm in a comparison."""
    return config.algorithm.name.removeprefix(f"{OWN}:")


def _folder(tree: dict[str, Any], label: str, seed: Any) -> str:
    return str(Path(tree.get("output") or Config().output) / f"{label}-seed-{seed}")


def _settings(tree: dict[str, Any], label: str, is_object: bool) -> dict[str, Any]:
    """The settings for one algorithm, without settings of other algorithms."""
    own: dict[str, Any] = json.loads(json.dumps(tree))
    given = own.get("algorithm")
    if is_object:
        return own | {"algorithm": {"name": f"{OWN}:{label}"}}
    try:
        entry = find(label)
    except (KeyError, FedVLMError):  # the check of the settings reports this
        return own | {"algorithm": {"name": label}}
    if given is None or isinstance(given, dict):
        own["algorithm"] = taken(label, given or {})
    if isinstance(own.get("lora"), dict):
        meant = {"ranks": entry.ranks, "spare": entry.spare}
        own["lora"] = {k: v for k, v in own["lora"].items() if meant.get(k, True)}
    return own


def _nobodys(tree: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    """Problems: settings that no compared algorithm has."""
    known, entries = {"name"}, []
    for label in labels:
        with contextlib.suppress(KeyError, FedVLMError):
            entries.append(find(label))
    for entry in entries:
        known |= entry.settings.model_fields.keys()
    given, lora = (tree.get(key) for key in ("algorithm", "lora"))
    idle = [f"algorithm.{k}" for k in given if k not in known] if isinstance(given, dict) else []
    takers = {"ranks": any(e.ranks for e in entries), "spare": any(e.spare for e in entries)}
    if isinstance(lora, dict):
        idle += [f"lora.{k}" for k, taken_ in takers.items() if lora.get(k) and not taken_]
    return [f"{key}: none of {', '.join(labels) or 'the objects'} has this setting" for key in idle]


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
            "with output=DIR, or remove this folder"
        )
    return stores.is_done(config.output)


class _Relay(Progress):
    """Forwards the rounds of a run under the run's name."""

    def __init__(self, name: str, tell: Tell):
        self.name, self.tell = name, tell

    def round(self, line: dict[str, Any], seconds: float) -> None:
        self.tell((self.name, line, seconds))


def run_one(name: str, config: Config, tell: Tell, algorithm: Algorithm | None = None) -> None:
    """Starts or continues a run.

    Args:
        name: the name of the run.
        config: the settings of the run.
        tell: called with (run, metrics line, seconds) after every round.
        algorithm: the algorithm as an object; None: the configured algorithm.
    """
    from fedvlm.rounds.federate import resume, run

    progress = _Relay(name, tell)
    if stores.is_run(config.output):
        resume(config.output, progress, algorithm=algorithm)
    else:
        run(config, algorithm=algorithm, progress=progress)


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
    """A pool that stops at once on an error or Ctrl-C; unfinished runs can be continued later."""
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
    """Leaves Ctrl-C to the parent process, and ends this process when the parent dies."""
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


def _conclude(folder: Path, runs: dict[str, Config]) -> Comparison:
    from fedvlm.figures.plots import plot_comparison

    results: dict[str, list[Results]] = {}
    for config in runs.values():
        results.setdefault(_label(config), []).append(Results.read(config.output))
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

"""compare(): several algorithms on the same partitions and the same initial weights."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm import config as configs
from fedvlm import processes
from fedvlm.algorithms.base import Algorithm
from fedvlm.algorithms.table import OWN
from fedvlm.errors import FedVLMError
from fedvlm.metrics import mean, standard_error
from fedvlm.rounds import shown
from fedvlm.rounds.claims import gains, steps, verdicts
from fedvlm.rounds.contenders import Compared, planned
from fedvlm.rounds.located import check_apart, located, with_rows
from fedvlm.rounds.pictures import COMPARISON, draw_comparison, read_comparison
from fedvlm.rounds.progress import Progress
from fedvlm.rounds.results import Results
from fedvlm.settings.sections import Config
from fedvlm.store import files
from fedvlm.store import run as stores
from fedvlm.store.made import settings_of
from fedvlm.store.replanned import stopped

if TYPE_CHECKING:
    import pandas as pd

Event = tuple[str, dict[str, Any], float]
Tell = Callable[[Event], None]
Work = Callable[[str, Config, Tell], None]
Idle = Callable[[Sequence[Path]], None]


@dataclass(frozen=True, repr=False)
class Comparison:
    """A finished comparison.

    Attributes:
        folder: the folder of the comparison; the runs are in its folders ``ALGORITHM-seed-N``.
        rows: one dict per algorithm, best first, with the columns of ``comparison.csv``.
        verdicts: one dict per client, see :func:`fedvlm.rounds.claims.verdicts`.
    """

    folder: Path
    rows: list[dict[str, Any]]
    verdicts: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: str | Path) -> Comparison:
        """Reads a finished comparison.

        Raises:
            FedVLMError: ``comparison.json`` is damaged.
        """
        found = read_comparison(Path(folder))
        return cls(Path(folder), found["algorithms"], found["verdicts"])

    def to_pandas(self) -> pd.DataFrame:
        """A row for each algorithm, the best first; the columns of ``comparison.csv``."""
        import pandas

        return pandas.DataFrame(self.rows)

    def __repr__(self) -> str:
        return f"<Comparison in '{self.folder}': {shown.compared(self.rows)}>"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self)[1:-1])}</p>{self.to_pandas().to_html(escape=True)}"


def compare(
    algorithms: Sequence[Compared],
    config: configs.Source = None,
    *overrides: str,
    data: Any = None,
    seeds: int = 1,
    jobs: int = 1,
    tell: Tell | None = None,
    idle: Idle | None = None,
) -> Comparison:
    """As :func:`fedvlm.compare`, which describes the other arguments, without the reports.

    Args:
        idle: called once in this process with the folders of the runs done so far, where fewer runs
            are left than ``jobs``: a core has nothing else to do.
    """
    runs = planned(algorithms, config, *overrides, seeds=seeds, jobs=jobs)
    if data is not None:
        first = next(iter(runs.values()))
        whole = with_rows(first.model_copy(update={"output": str(Path(first.output).parent)}), data)
        runs = {name: c.model_copy(update={"data": whole.data}) for name, c in runs.items()}
    objects = dict(a for a in algorithms if not isinstance(a, str))
    folder = Path(next(iter(runs.values())).output).parent
    if stores.is_run(folder):
        raise FedVLMError(
            f"output: '{folder}' holds a single run; choose another folder with output=DIR"
        )
    _check_ours(folder, runs)
    left = {name: c for name, c in runs.items() if not done(c)}
    work: Work = run_one
    if objects:

        def work(name: str, config: Config, tell: Tell) -> None:
            run_one(name, config, tell, objects.get(_label(config)))

    each(work, left, jobs, tell, idle)
    return _conclude(folder, runs)


def each(
    work: Work,
    runs: Mapping[str, Config],
    jobs: int = 1,
    tell: Tell | None = None,
    idle: Idle | None = None,
) -> None:
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
        idle: as for :func:`compare`; not called with one job.
    """
    tell = tell or (lambda event: None)
    if jobs == 1:
        from fedvlm.models.frozen import handed_on

        with handed_on():
            for name, c in runs.items():
                work(name, c, tell)
    elif runs:
        _in_processes(work, runs, jobs, tell, idle or (lambda folders: None))


def _check_ours(folder: Path, runs: Mapping[str, Config]) -> None:
    """Refuses a folder with files of the comparison's names that no comparison wrote."""
    there = [folder / f"comparison.{kind}" for kind in ("csv", "json", "png")]
    there.append(folder / stores.REPORT)
    taken = [path for path in there if path.exists()]
    for config in runs.values():
        data = Path(os.path.expanduser(config.data.path or ""))
        if data.is_file() and any(path.samefile(data) for path in taken):
            raise FedVLMError(
                f"output: '{data}' is the data, and the comparison would overwrite it; choose "
                "another folder with output=DIR"
            )
    if taken and not any(map(stores.is_run, (config.output for config in runs.values()))):
        raise FedVLMError(
            f"output: '{taken[0]}' exists and is of no comparison; choose another folder with "
            "output=DIR"
        )
    for config in runs.values():
        check_apart(config)


def _label(config: Config) -> str:
    """The name of a run's algorithm in a comparison."""
    return config.algorithm.name.removeprefix(f"{OWN}:")


def done(config: Config) -> bool:
    """Whether a run is finished.

    Raises:
        FedVLMError: its folder holds a run with other settings.
    """
    if not stores.is_run(config.output):
        return False
    if config.algorithm.name.partition(":")[0] == OWN:
        raise FedVLMError(
            f"output: '{config.output}' holds a run of an object, and nothing shows that it is "
            f"the one labelled '{_label(config)}' now; remove that folder, or choose another "
            "with output=DIR"
        )
    stores.check_whole(config.output)
    with settings_of(config.output):
        there = _as_told(configs.load(Path(config.output) / stores.CONFIG), config.output)
    same = {"output": "", "engine": config.engine}
    if there.model_copy(update=same) != located(config).model_copy(update=same):
        raise FedVLMError(
            f"output: '{config.output}' holds a run with other settings; choose another folder "
            "with output=DIR, or remove this folder"
        )
    return stores.is_done(config.output)


def _as_told(config: Config, folder: str) -> Config:
    """The settings that a run began with, where its rounds ended early by themselves."""
    if (rounds := stopped(folder)) is None:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"rounds": rounds})})


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
        resume(config.output, progress=progress, algorithm=algorithm)
    else:
        run(config, algorithm=algorithm, progress=progress)


def _in_processes(
    work: Work, runs: Mapping[str, Config], jobs: int, tell: Tell, idle: Idle
) -> None:
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
        futures = {pool.submit(work, n, c, events.put): c for n, c in runs.items()}
        try:
            for left, future in zip(reversed(range(len(runs))), as_completed(futures), strict=True):
                future.result()
                if left == jobs - 1:
                    idle([Path(c.output) for done, c in futures.items() if done.done()])
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
    processes.own()

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
    results: dict[str, list[Results]] = {}
    for config in runs.values():
        results.setdefault(_label(config), []).append(Results.read(config.output))
    rows = [_row(name, found) | gains(name, results) for name, found in results.items()]
    rows.sort(key=lambda row: -row["personal"])
    found = verdicts(results)
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(folder / "comparison.csv", out.getvalue())
    both = {"algorithms": rows, "verdicts": found}
    files.write_text(folder / COMPARISON, json.dumps(both, indent=2) + "\n")
    found_in = {row["algorithm"]: [r.folder for r in results[row["algorithm"]]] for row in rows}
    draw_comparison(folder, found_in, list(runs.values()))
    return Comparison(folder, rows, found)


def _row(name: str, found: Sequence[Results]) -> dict[str, Any]:
    personal = [r.summary("personal")["mean"] for r in found]
    over_rows = [r.summary("personal").get("mean_rows") for r in found]
    one = found[0].summary("personal").get("interval") if len(found) == 1 else None
    timing = [stores.Store(r.folder).timing() for r in found]
    return {
        "algorithm": name,
        "seeds": len(found),
        "metric": found[0].metric,
        "personal": mean(personal),
        "standard_error": standard_error(personal) if len(found) > 1 else None,
        "personal_low": one[0] if one else None,
        "personal_high": one[1] if one else None,
        "personal_rows": None
        if None in over_rows
        else mean([m for m in over_rows if m is not None]),
        "clients": len(found[0].scores()),
        "rows": found[0].table["models"]["personal"].get("rows"),
        "worst10": mean([r.summary("personal")["worst10"] for r in found]),
        "spread": mean([r.summary("personal")["std"] for r in found]),
        "personal_before": _before(found),
        "global": mean([r.summary("global")["mean"] for r in found]),
        "untuned": mean([r.summary("untuned")["mean"] for r in found]),
        "steps": steps(found),
        "passes": mean([r.table.get("passes", 0) for r in found]),
        "bytes_up": mean([r.table["bytes"]["bytes_up"]["total"] for r in found]),
        "bytes_down": mean([r.table["bytes"]["bytes_down"]["total"] for r in found]),
        "seconds": mean([sum(line.get("seconds", 0.0) for line in t) for t in timing]),
    }


def _before(found: Sequence[Results]) -> float | None:
    """The mean of the personal models before the last aggregation; None without their scores."""
    if not all("personal_before" in r.table["models"] for r in found):
        return None
    return mean([r.summary("personal_before")["mean"] for r in found])

"""Experiment trackers: what a run sends to trackio, Weights & Biases, MLflow or TensorBoard.

A tracker gets what the lines of ``metrics.jsonl`` hold, by round, and the tables and adapters of
the server's folder at the end: no rows and no answers. ``report_to`` names the trackers. A tracker
that fails, such as without a network, is a warning; the run goes on without it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedvlm.errors import ConfigError, cut
from fedvlm.metrics import mean
from fedvlm.rounds.progress import Progress, Several
from fedvlm.settings.plain import dotted
from fedvlm.settings.sections import Config
from fedvlm.store.files import slugs, write_text

KNOWN = "trackers.json"
"""The file in a run's folder with the trackers' own numbers of the run, for resuming."""
PROJECT = "fedvlm"
FILES = ("config.yaml", "table.csv", "table.json", "groups.csv", "curves.png")

logger = logging.getLogger("fedvlm")


def tracked(config: Config, progress: Progress, callbacks: Sequence[Progress] = ()) -> Progress:
    """The progress of a run with its trackers and a program's own callbacks.

    Args:
        config: the settings; ``report_to`` names the trackers.
        progress: what the run shows.
        callbacks: more receivers of the run's events.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    missing = [n for n in config.report_to if find_spec(TRACKERS[n].package) is None]
    if missing:
        names = " ".join(TRACKERS[name].install for name in missing)
        raise ConfigError([f"report_to: {', '.join(missing)} is missing: pip install {names}"])
    found = [TRACKERS[name](name) for name in config.report_to]
    return Several([progress, *map(Reports, found), *callbacks]) if found or callbacks else progress


def values_of(line: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """The numbers of a line of metrics, by names such as ``personal/exact_match/site-0``."""
    found: dict[str, float] = {"seconds": seconds} if seconds else {}
    losses = line.get("train_loss") or {}
    scores = {
        (model, client): own
        for model, clients in (line.get("evaluation") or {}).items()
        for client, own in clients.items()
    }
    names = slugs(sorted({*losses, *(client for _, client in scores)}))
    if losses:
        found["loss/mean"] = mean(losses.values())
        found |= {f"loss/{names[client]}": loss for client, loss in losses.items()}
    for (model, client), own in scores.items():
        found |= {f"{model}/{metric}/{names[client]}": score for metric, score in own.items()}
    for model in dict.fromkeys(model for model, _ in scores):
        for metric in next(own for (m, _), own in scores.items() if m == model):
            values = [own[metric] for (m, _), own in scores.items() if m == model and metric in own]
            found[f"{model}/{metric}/mean"] = mean(values)
    for way in ("bytes_up", "bytes_down"):
        if way in line:
            found[way] = sum(line[way].values())
    if "epsilon" in line:
        found["epsilon"] = line["epsilon"]
    found["rejected"] = len(line.get("rejected", ()))
    return {name: float(value) for name, value in found.items()}


class Tracker:
    """Opens a tracker's run at the first line, and closes it at the end.

    Args:
        name: the name in ``report_to``.
    """

    package = install = ""

    def __init__(self, name: str):
        self.name = name
        self.run: Any = None

    def begin(self, config: Config) -> None:
        """The run begins; its folder may not exist yet."""
        self.config, self.folder = config, Path(config.output)

    def round(self, line: Mapping[str, Any], seconds: float) -> None:
        """A round was committed."""
        if self.run is None:
            self.run = self.open(self._number())
        self.log(values_of(line, seconds), line["round"])

    def finish(self) -> None:
        """The results are written."""
        if self.run is not None:
            self.keep([path for name in FILES if (path := self.folder / name).exists()])

    def end(self, whole: bool) -> None:
        """The run has ended; ``whole``: with its results."""
        if self.run is not None:
            self.close(whole)

    @property
    def title(self) -> str:
        """The run's name at the tracker: the last two parts of its folder."""
        return "/".join(Path(os.path.abspath(self.folder)).parts[-2:])

    def _number(self) -> str:
        """This run's number at the tracker; a resumed run has the same one."""
        path = self.folder / KNOWN
        known = json.loads(path.read_text()) if path.exists() else {}
        if self.name not in known:
            known[self.name] = uuid.uuid4().hex[:12]
            write_text(path, json.dumps(known) + "\n")
        return str(known[self.name])

    # -- implemented by each tracker

    def open(self, number: str) -> Any:
        raise NotImplementedError

    def log(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def keep(self, files: Iterable[Path]) -> None:
        """Stores files at the tracker; not every tracker can."""

    def close(self, whole: bool) -> None:
        raise NotImplementedError


class WandB(Tracker):
    """Weights & Biases; ``WANDB_MODE=offline`` writes into the run's folder only."""

    package = install = "wandb"

    def open(self, number: str) -> Any:
        import wandb

        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.title,
            id=number,
            resume="allow",
            dir=str(self.folder),
            config=self.config.model_dump(),
            reinit="create_new",
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def keep(self, files: Iterable[Path]) -> None:
        import wandb

        found = wandb.Artifact(f"run-{self.run.id}", type="run")
        for path in files:
            found.add_file(str(path))
        self.run.log_artifact(found)

    def close(self, whole: bool) -> None:
        self.run.finish(exit_code=0 if whole else 1)


class MLflow(Tracker):
    """MLflow, at ``MLFLOW_TRACKING_URI`` or in its default place."""

    package, install = "mlflow", "mlflow-skinny"

    def open(self, number: str) -> Any:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = client = MlflowClient()
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = client.get_experiment_by_name(project)
        place = known.experiment_id if known else client.create_experiment(project)
        mark = f"tags.fedvlm = '{number}'"
        if before := client.search_runs([place], mark, max_results=1):
            return before[0].info.run_id
        run = client.create_run(place, run_name=self.title, tags={"fedvlm": number})
        params = [Param(k, str(v)[:500]) for k, v in dotted(self.config.model_dump())]
        client.log_batch(run.info.run_id, params=params)
        return run.info.run_id

    def log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), 1000):  # MLflow's limit
            self.client.log_batch(self.run, metrics=metrics[start : start + 1000])

    def keep(self, files: Iterable[Path]) -> None:
        for path in files:
            self.client.log_artifact(self.run, str(path))

    def close(self, whole: bool) -> None:
        self.client.set_terminated(self.run, "FINISHED" if whole else "FAILED")


class TensorBoard(Tracker):
    """Event files in the folder ``tensorboard`` of the run."""

    package = install = "tensorboard"

    def open(self, number: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.folder / "tensorboard"))
        settings = dotted(self.config.model_dump())  # indented lines are shown as they are
        writer.add_text("settings", "".join(f"    {name}: {value}\n" for name, value in settings))
        return writer

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.run.add_scalar(name, value, step)

    def close(self, whole: bool) -> None:
        self.run.close()


class Trackio(Tracker):
    """Trackio, on this machine unless its own settings name a Space."""

    package = install = "trackio"

    def open(self, number: str) -> Any:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = f"{self.title} {number}"
        return trackio.init(
            project=project, name=name, resume="allow", config=self.config.model_dump()
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def keep(self, files: Iterable[Path]) -> None:
        import trackio

        found = trackio.Artifact(f"run-{self._number()}", type="run")
        for path in files:
            found.add_file(path)
        self.run.log_artifact(found)

    def close(self, whole: bool) -> None:
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "trackio": Trackio,
    "wandb": WandB,
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
}


class Reports(Progress):
    """Sends a run's events to a tracker. After a failure, the tracker gets nothing more."""

    def __init__(self, tracker: Tracker):
        self.tracker, self.broken = tracker, False

    @contextlib.contextmanager
    def started(self, config: Config) -> Iterator[None]:
        self._try(self.tracker.begin, config)
        whole = False
        try:
            yield
            whole = True
        finally:
            self._try(self.tracker.end, whole)

    def round(self, line: dict[str, Any], seconds: float) -> None:
        self._try(self.tracker.round, line, seconds)

    def finished(self, results: Any) -> None:
        self._try(self.tracker.finish)

    def _try(self, act: Callable[..., None], *given: Any) -> None:
        if self.broken:
            return
        try:
            act(*given)
        except Exception as error:
            self.broken = True
            reason = cut(f"{type(error).__name__}: {error}")
            logger.warning("report_to=%s failed; the run goes on: %s", self.tracker.name, reason)

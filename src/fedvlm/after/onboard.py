"""onboard(): a site that joins after training gets a personal model in a few local steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedvlm import config as configs
from fedvlm.after import card, export, loading
from fedvlm.after.evaluate import on_new_data
from fedvlm.after.opened import ONBOARDED, SCORES, Opened, open_run
from fedvlm.after.outputs import check_writable
from fedvlm.algorithms.base import Algorithm, Averaged, Local, Program, Sent, Visit
from fedvlm.algorithms.dry import rehearse
from fedvlm.algorithms.ending import averages, best, stretches, without
from fedvlm.engines.wire import Task
from fedvlm.errors import DataError, FedVLMError
from fedvlm.intervals import intervals
from fedvlm.metrics import average
from fedvlm.rounds.schedule import standing
from fedvlm.settings.sections import Config
from fedvlm.store import files, sealed
from fedvlm.store import run as stores
from fedvlm.tree import Tree

MOST_STEPS = 100
CHECKS = 5  # validations during the tuning


@dataclass(frozen=True)
class Onboarded:
    """A site that joined a finished run.

    Attributes:
        folder: the folder with the site's adapter, personal factors, scores and card.
        table: the content of ``scores.json``.
    """

    folder: Path
    table: dict[str, Any]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """``untuned``, ``shared``, ``alone`` and ``personal`` -> metric -> number."""
        return self.table["scores"]


def onboard(
    folder: str | Path,
    data: str | Path,
    *overrides: str,
    name: str | None = None,
    steps: int | None = None,
    lr: float | None = None,
    algorithm: Algorithm | None = None,
) -> Onboarded:
    """Gives a new site its own model, from the shared factors of a finished run and its own rows.

    The site gets the download of a client. It tunes only the factors that the run's algorithm keeps
    personal, or all factors if the algorithm keeps none. It keeps the adapter with the lowest loss
    on its validation rows: the download, a point of the tuning, or a mean of such points. It is
    scored on held-out rows, split like in the run. The files of the run do not change. The site's
    files are in ``FOLDER/onboarded/NAME``, and its name then works like the name of a client.

    Args:
        folder: the run's folder.
        data: the site's rows, in the run's columns.
        *overrides: changed settings, in the sections model, data, train, eval, engine.
        name: the name of the site; None: the name of the data.
        steps: optimizer steps; None: as many as a client with this number of rows took in all
            rounds, at most 100.
        lr: learning rate of all factors; None: the learning rates of the run.
        algorithm: the object that the run was made with, if it was one.

    Raises:
        FedVLMError: there is no finished run, the name is taken, or the rows cannot be used.
    """
    run = open_run(folder, *overrides, algorithm=algorithm)
    site = name if name is not None else Path(data).stem
    target = _target(run, site)
    config = _settings(run.config, data, lr)
    rows, split = _rows(run, config, site)
    count = steps if steps is not None else _steps(config, len(split.train))
    if count < 1:
        raise FedVLMError(f"--steps {count}: give at least one")
    algorithm, state = run.algorithm, stores.Store(run.folder).server()
    visit = standing(config, algorithm).visit(site, float(len(split.train)))
    down = algorithm.send(state, visit)
    shared = algorithm.model(run.initial, down, {})
    kept, personal = _personal(algorithm, run.initial, visit, down)
    everything = set(run.initial)
    # The round after the last round, where the schedule of the learning rate has ended.
    after = Visit(site, visit.weight, round=config.train.rounds + 1)
    with TemporaryDirectory() as scratch:

        def tuned(begin: Tree, trained: set[str]) -> tuple[Any, Tree]:
            one = _tuning(begin, trained, count)
            engine = run.engine(rows, {site: split}, config, Path(scratch), one)
            list(engine.train([Task(after, {}, rated=True)]))
            return engine, engine.ended.pop(site)

        _, own = tuned(shared, personal)
        engine, alone = tuned(run.initial, everything)
        models = {"untuned": run.initial, "shared": shared, "alone": alone, "personal": own}
        found = {m: engine.answers([(site, tree)])[site] for m, tree in models.items()}
    all_ = "" if kept else ", since the algorithm keeps nothing personal"
    table = {
        "site": site,
        "data": f"`{Path(data).name}`",
        "rows": {k: len(getattr(split, k)) for k in ("train", "val", "test")},
        "split": config.eval.split,
        "steps": count,
        "trained": f"{card.factors(sorted(personal))} ({len(personal)} tensors{all_})",
        "algorithm": config.algorithm.name,
        "scores": {m: average(answers) for m, answers in found.items()},
        "intervals": {m: intervals(answers) for m, answers in found.items()},
    }
    _write(run, target, table, own, {n: own[n] for n in personal})
    return Onboarded(target, table)


def _settings(config: Config, data: str | Path, lr: float | None) -> Config:
    """The run's settings for the rows of one site, with the run's section ``eval``."""
    settings = on_new_data(config, data).model_copy(update={"eval": config.eval})
    least: dict[str, Any] = {
        "kind": "iid",
        "column": None,
        "clusters": None,
        "clients": 1,
        "min_rows": 2,
    }
    tree = settings.model_dump()
    tree["partition"] |= least
    if lr is not None:
        tree["train"] |= {"lr": lr, "lr_a": None, "lr_b": None}
    return configs.load(tree)


def _rows(run: Opened, config: Config, site: str) -> tuple[Any, Any]:
    """The site's rows and their split, made like in a run."""
    from fedvlm.data.partition import make_partition
    from fedvlm.data.sources import load_rows

    rows = run.usable(load_rows(config.data, config.seed, pairs=run.pairs))
    if len(rows) < 2:
        raise DataError(f"site '{site}' has {len(rows)} row; it needs one to train and one to test")
    (split,) = make_partition(rows, config).splits.values()
    if not len(getattr(split, config.eval.split)):
        raise DataError(
            f"site '{site}' has {len(rows)} rows, but none in '{config.eval.split}', the split "
            "that the run scores; give it more rows, or set eval.split=test"
        )
    return rows, split


def _steps(config: Config, rows: int) -> int:
    return min(MOST_STEPS, config.train.rounds * config.train.steps(rows))


def _personal(
    algorithm: Algorithm, initial: Tree, visit: Visit, down: Tree
) -> tuple[bool, set[str]]:
    """Whether the algorithm keeps anything, and the kept factors; all factors if it keeps none."""
    usual = replace(visit, final=False)
    kept = without(rehearse(algorithm, initial, usual, down, 1).sent.keep)
    return bool(kept), set(kept) & set(initial) or set(initial)


def _tuning(begin: Tree, trained: set[str], steps: int) -> Algorithm:
    """An algorithm that tunes some factors from ``begin`` and sends nothing.

    The client keeps ``begin``, a point of the tuning, or the mean of all points up to one of them,
    whichever has the lowest validation loss. Without validation rows, it keeps the last point.
    """

    def work(local: Local) -> Program:
        points = yield from stretches(begin, steps, CHECKS, lambda name: name in trained)
        end = yield from best([*averages(points), *points[1:]])
        return Sent({}, {name: end[name] for name in begin if name in trained})

    return Algorithm(
        init=lambda initial: {},
        send=lambda state, visit: {},
        model=lambda initial, down, mine: {**begin, **mine},
        work=work,
        server=Averaged(lambda state, mean, round: {}),
    )


def _target(run: Opened, site: str) -> Path:
    if not site.strip() or not site.isprintable():
        raise FedVLMError(f"{site!r:.80} is no name for a site; give one with --name NAME")
    if site in run.partition.splits:
        raise FedVLMError(
            f"'{site}' is a client of the run in '{run.folder}'; give the new site another name "
            "with --name NAME"
        )
    if site in run.onboarded:
        raise FedVLMError(
            f"the site '{site}' has been onboarded: '{run.onboarded[site]}' exists; remove this "
            "folder to do it again, or give another name with --name NAME"
        )
    # Sites whose names give the same folder are numbered.
    place, name = run.folder / ONBOARDED, files.slugs([site])[site]
    free = (place / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    folder = next(path for path in free if not path.exists())
    check_writable("--name", folder)
    return folder


def _write(
    run: Opened, target: Path, table: Mapping[str, Any], adapter: Tree, personal: Tree
) -> None:
    from fedvlm.models.load import BUNDLED
    from fedvlm.models.lora import save_adapter

    name = run.config.model.name
    base = export.base_name(name)
    with export.new_folder(target) as scratch:
        plain = scratch / "plain"
        save_adapter(run.write(adapter), adapter, plain)
        export.write_adapter(plain, base, scratch)
        for path in plain.iterdir():
            path.unlink()
        plain.rmdir()
        files.save_tree(scratch / "personal.safetensors", personal)
        names = [path.name for path in scratch.iterdir()]
        sealed.write(scratch / SCORES, {**table, "files": sealed.digests(scratch, names)})
        shown = loading.filled(loading.of_adapter(base, name in BUNDLED), run.config)
        text = card.of_site(run, table, base=base, tree=adapter, loading=shown, merged=False)
        files.write_text(scratch / "README.md", text)

"""run(): the only round loop."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm import config as configs
from fedvlm.algorithms.table import Client, State, build
from fedvlm.engines.base import Engine, Models, Scores
from fedvlm.engines.group import Group, joined
from fedvlm.engines.wire import Forms, Task
from fedvlm.errors import FedVLMError
from fedvlm.rounds.fold import Fold
from fedvlm.rounds.prepare import _weights, prepare
from fedvlm.rounds.progress import Progress, Quiet
from fedvlm.rounds.results import (
    Results,
    global_models,
    personal_models,
    scored,
    write_answers,
    write_results,
)
from fedvlm.rounds.schedule import Round, of_round, plan
from fedvlm.settings.sections import Config
from fedvlm.store import run as stores
from fedvlm.tree import digest, saved_bytes

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition


def run(
    config: str | Path | dict[str, Any] | Config | None = None,
    *overrides: str,
    resume: bool = False,
    progress: Progress | None = None,
) -> Results:
    """Runs one federated fine-tuning, from data to a folder with everything that came out.

    Where ``torchrun`` has started several processes, they all call this, and share the clients; the
    first one tells ``progress``.

    Args:
        config: path of a YAML file, a nested dict, a ``Config``, or None for the defaults.
        *overrides: dotted assignments, such as ``"train.rounds=20"``.
        resume: go on with the unfinished run in ``config.output``.
        progress: told what happens; None is silent.

    Returns:
        The results: scores per client and their summary, the bytes, the folder.

    Raises:
        ConfigError: the configuration is wrong; all mistakes at once.
        DataError: the data cannot be used as asked.
        FedVLMError: the model, the device or the output folder cannot be used.
    """

    settings = configs.load(config, *overrides)
    progress = progress or Quiet()
    if not resume:
        stores.check_fresh(settings.output)
    with joined() as group:
        if group.rank:
            return _follow(settings, group)
        with progress.started(settings):
            engine, partition, store = _prepare_all(settings, group, progress)
            progress.partitioned(partition)
            with store.locked():
                begin(settings, store, {"partition.json": json.dumps(partition.to_dict())}, resume)
                _draw(partition, store.folder)
                results = drive(settings, engine, _weights(settings, partition), store, progress)
    return results


def resume(folder: str | Path, progress: Progress | None = None) -> Results:
    """Goes on with the run in ``folder``, to the same bytes as if it had never stopped.

    Raises:
        FedVLMError: the folder holds no run, or its data are not what they were.
    """
    if not stores.is_run(folder):
        raise FedVLMError(f"'{folder}' holds no run; start one with 'fedvlm run output={folder}'")
    settings = configs.load(Path(folder) / stores.CONFIG)
    settings = settings.model_copy(update={"output": str(folder)})
    if stores.is_done(folder):
        return Results.read(folder)
    return run(settings, resume=True, progress=progress)


def _prepare_all(
    config: Config, group: Group, progress: Progress
) -> tuple[Engine, Partition, stores.Store]:
    """As :func:`prepare`, with all processes ready to take part."""
    if group.size == 1:
        return prepare(config, progress)
    from fedvlm.engines.sharded import Sharded, together

    engine, partition, store = together(group, lambda: prepare(config, progress), _described)
    return Sharded(engine, group), partition, store


def _follow(config: Config, group: Group) -> Results:
    """A run in a process other than the first: it does what that one hands out."""
    from fedvlm.engines.sharded import serve, together

    engine, _, _ = together(group, lambda: prepare(config), _described)
    algorithm = build(config.algorithm, config.lora, config.wire)
    serve(group, engine, lambda number: of_round(config, algorithm, number))
    return Results.read(config.output)


def _described(prepared: tuple[Engine, Partition, stores.Store]) -> str:
    """What has to be the same in all processes: who has which rows, and the initial adapter."""
    engine, partition, _ = prepared
    return digest(engine.adapter) + json.dumps(partition.to_dict())


def begin(config: Config, store: stores.Store, described: Mapping[str, str], resume: bool) -> None:
    """Makes a run's folder, or takes it back to the last finished round.

    Args:
        config: of the run.
        store: its folder, locked.
        described: a file -> what it says of the clients, which a resumed run has to say as well.
        resume: whether the run has begun before.

    Raises:
        FedVLMError: the folder is in use, or the clients are not what they were.
    """
    if resume:
        if any((store.folder / name).read_text() != text for name, text in described.items()):
            raise FedVLMError(
                f"the data are not what they were when the run in '{store.folder}' began: another "
                "partition came out; restore them, or start a new run with output=DIR"
            )
        store.rewind()
    else:
        stores.check_fresh(store.folder)
        about = {
            "environment.json": json.dumps(prepare.environment(), indent=2) + "\n",
            stores.CONFIG: configs.dump(config),
        }
        store.create({**described, **about})


def _draw(partition: Partition, folder: Path) -> None:
    picture = folder / "partition.png"
    if not picture.exists():
        from fedvlm.figures.skewplot import plot_partition

        plot_partition(partition, picture)


def drive(
    config: Config,
    engine: Engine,
    weights: Mapping[str, float],
    store: stores.Store,
    progress: Progress,
) -> Results:
    """All rounds from the last finished one on, and the results; the same for every engine.

    Args:
        config: of the run.
        engine: which has the clients.
        weights: client -> its weight in a mean, the number of its training examples.
        store: the run's folder, locked and begun.
        progress: told what happens.
    """
    algorithm, names = build(config.algorithm, config.lora, config.wire), tuple(weights)
    clients, forms = scored(config, names), Forms(engine.adapter, config.wire.max_norm)
    if store.finished() is None:
        state = algorithm.init(engine.adapter)
        untuned = _score_all(engine, Round(0, (), algorithm, True), state, clients)
        answers = engine.answer("untuned", personal_models(algorithm, state, clients))
        write_answers(store.folder, "untuned", answers)
        line = {"round": 0, "evaluation": {"personal": untuned[0], "global": untuned[1]}}
        store.commit(0, state, line, {"round": 0})
        progress.round(line, 0.0)
    state, done = store.server(), store.finished() or 0
    for round_ in plan(config, algorithm, names):
        if round_.number > done:
            began = time.perf_counter()
            rated = clients if round_.evaluate else ()
            state, line = _round(round_, engine, weights, state, rated, progress, forms)
            seconds = time.perf_counter() - began
            store.commit(round_.number, state, line, {"round": round_.number, "seconds": seconds})
            progress.round(line, seconds)
    results = write_results(config, names, store, engine)
    progress.finished(results)
    return results


def _round(
    round_: Round,
    engine: Engine,
    weights: Mapping[str, float],
    state: State,
    clients: Sequence[str],
    progress: Progress,
    forms: Forms,
) -> tuple[State, dict[str, Any]]:
    """Downloads, local training, aggregation, and the scores of ``clients``."""
    algorithm, rated = round_.algorithm, frozenset(clients)
    known = _known(weights, round_.cohort)
    down = {c: algorithm.download(state, known[c]) for c in round_.cohort}
    tasks = [Task(c, round_.number, down[c], c in rated) for c in round_.cohort]
    fold = Fold(algorithm, known, down, forms)

    def ends() -> Iterator[tuple[str, dict[str, Any]]]:
        for reply in engine.train(algorithm, tasks):
            counts = fold.add(reply)
            progress.trained(reply.client, reply.loss)
            if counts and reply.client in rated:
                yield reply.client, {}

    # This trains them all; a pass is scored before the next is trained.
    before = engine.score(Models("end", algorithm, ends(), round_.number))
    old, state = state, fold.update(state)
    line: dict[str, Any] = {
        "round": round_.number,
        "cohort": list(round_.cohort),
        "train_loss": fold.losses,
        "bytes_up": fold.bytes_up,
        "bytes_down": {c: saved_bytes(tree) for c, tree in down.items()},
        "evaluation": None,
    } | ({"rejected": fold.rejected} if fold.rejected else {})
    answered = fold.losses.keys() | fold.rejected.keys()
    if missing := [c for c in round_.cohort if c not in answered]:
        line["missing"] = missing
    if clients:
        idle = [c for c in clients if c not in before]
        idle_before, global_before = _score_all(engine, round_, old, clients, idle)
        personal, everyone = _score_all(engine, round_, state, clients)
        before |= idle_before
        line["evaluation"] = {
            "personal": personal,
            "global": everyone,
            "personal_before": {c: before[c] for c in clients if c in before},
            "global_before": global_before,
        }
    return state, line


def _score_all(
    engine: Engine,
    round_: Round,
    state: State,
    clients: Sequence[str],
    personal: Sequence[str] | None = None,
) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """Scores of the clients' personal models (or of those named) and of the global model."""
    own = clients if personal is None else personal
    algorithm, number = round_.algorithm, round_.number
    return (
        engine.score(personal_models(algorithm, state, own, number)),
        engine.score(global_models(algorithm, state, clients, number)),
    )


def _known(weights: Mapping[str, float], cohort: Sequence[str]) -> dict[str, Client]:
    """What the server knows of the clients of a round."""
    sampled = sum(weights[c] for c in cohort) / sum(weights.values())
    return {c: Client(c, weights[c], sampled) for c in cohort}

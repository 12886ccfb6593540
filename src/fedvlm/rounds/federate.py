"""run(): the only round loop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm import config as configs
from fedvlm.algorithms.base import Algorithm, State, Visit
from fedvlm.algorithms.table import of_run
from fedvlm.engines.base import Engine, Models, Scores
from fedvlm.engines.functions import Function
from fedvlm.engines.group import Group, joined
from fedvlm.engines.summand import Summed
from fedvlm.engines.wire import Forms, Task
from fedvlm.errors import FedVLMError
from fedvlm.privacy import accountant
from fedvlm.processes import peak_memory
from fedvlm.rounds import more, noisymean, placed, robust, secure
from fedvlm.rounds.beginning import begin, check_same, described
from fedvlm.rounds.budget import Budget, budget_of
from fedvlm.rounds.fold import Fold
from fedvlm.rounds.located import check_apart, located, with_rows
from fedvlm.rounds.noisymean import NoisyMean
from fedvlm.rounds.objects import Objects
from fedvlm.rounds.patience import Patience
from fedvlm.rounds.pictures import draw_curves, draw_partition
from fedvlm.rounds.prepare import prepare, weights_of
from fedvlm.rounds.progress import Progress, Quiet
from fedvlm.rounds.results import (
    Results,
    global_models,
    personal_models,
    scored,
    write_answers,
    write_results,
)
from fedvlm.rounds.schedule import Round
from fedvlm.rounds.seen import watched
from fedvlm.rounds.trackers import tracked
from fedvlm.settings.aggregate import AggregateConfig
from fedvlm.settings.scoring import EvalConfig
from fedvlm.settings.sections import Config
from fedvlm.store import run as stores
from fedvlm.store.made import settings_of
from fedvlm.tree import Tree, digest, saved_bytes

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition
    from fedvlm.engines.shell import Shell


def run(
    config: configs.Source = None,
    *overrides: str,
    data: Any = None,
    algorithm: Algorithm | None = None,
    metrics: Mapping[str, Function] | None = None,
    model: tuple[Any, Any] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[Progress] = (),
) -> Results:
    """The run of :func:`fedvlm.run`, which describes the arguments, without its report."""
    objects = Objects.of(algorithm, metrics, model)
    return _run(objects, objects.settings(config, *overrides), data, resume, progress, callbacks)


def _run(
    objects: Objects,
    settings: Config,
    data: Any,
    resume: bool,
    progress: Progress | None,
    callbacks: Sequence[Progress],
) -> Results:
    """A new or a resumed run; see :func:`run`."""
    check(settings, of_run(settings, objects.algorithm))
    objects.check(settings)
    progress = tracked(settings, progress or Quiet(), callbacks)
    if not resume:
        stores.check_fresh(settings.output)
        settings = with_rows(settings, data)
        check_apart(settings)
    with joined() as group:
        if group.rank:
            return _follow(located(settings), group, objects)
        with progress.started(settings):
            settings = located(settings)
            engine, partition, store, described, budget = _prepare_all(
                settings, group, progress, objects
            )
            progress.partitioned(partition)
            robust.check(settings, engine.algorithm, len(partition.clients))
            secure.check(settings, engine.algorithm, len(partition.clients))
            with store.locked():
                if resume:
                    check_same(store.folder, described)
                    more.replan(store, settings, engine.algorithm.final)
                begin(settings, store, described, resume)
                weights = weights_of(settings, partition)
                engine = watched(engine, partition, settings, store.folder)
                results = drive(settings, engine, weights, store, progress, budget)
                draw_partition(partition, store.folder)  # matplotlib would delay the first round
    return results


def resume(
    folder: str | Path,
    *overrides: str,
    progress: Progress | None = None,
    callbacks: Sequence[Progress] = (),
    algorithm: Algorithm | None = None,
    metrics: Mapping[str, Function] | None = None,
    model: tuple[Any, Any] | None = None,
) -> Results:
    """As :func:`fedvlm.resume`, which describes the arguments, without the report."""
    more.check_moved(overrides)
    stores.check_whole(folder)
    if not stores.is_run(folder):
        raise FedVLMError(
            f"'{folder}' holds no run"
            + (" that has begun" if stores.has_not_begun(folder) else "")
            + "; start it with the command and the settings that you used"
        )
    objects = Objects.of(algorithm, metrics, model)
    with settings_of(folder):
        settings = objects.read(Path(folder) / stores.CONFIG, *overrides)
    settings = settings.model_copy(update={"output": str(folder)})
    other = more.check(Path(folder), settings, of_run(settings, algorithm).final)
    if stores.is_done(folder) and not other:
        return Results.read(folder)
    for key, path in (("data.path", settings.data.path), ("model.name", settings.model.name)):
        if path and os.path.isabs(path) and not os.path.exists(path):
            raise FedVLMError(
                f"{key}: '{path}' is not there any more; if it has moved, give its new place: "
                f"fedvlm run --resume {folder} {key}=..."
            )
    return _run(objects, settings, None, True, progress, callbacks)


def check(settings: Config, algorithm: Algorithm) -> None:
    """Refuses a run whose settings the algorithm cannot fulfil, as far as settings show it.

    Raises:
        ConfigError: names the setting.
    """
    placed.check(settings)
    robust.check(settings, algorithm)
    secure.check(settings, algorithm)
    noisymean.check(settings, algorithm)
    if settings.privacy.unit is not None:
        accountant.check_installed()


Prepared = tuple["Shell", "Partition", stores.Store]
All = tuple[Engine, "Partition", stores.Store, dict[str, str], Budget | None]


def _prepare_all(config: Config, group: Group, progress: Progress, objects: Objects) -> All:
    """Prepares the run in all processes; see :func:`prepare` and :func:`described`."""
    if group.size == 1:
        found, texts = _prepared(config, objects, progress)
        return *found, texts, budget_of(found[0])
    from fedvlm.engines.sharded import Sharded, together

    work = partial(_prepared, config, objects, progress)
    (engine, partition, store), texts = together(group, work, _same, not config.model.shard)
    return Sharded(engine, group), partition, store, texts, budget_of(engine)


def _follow(config: Config, group: Group, objects: Objects) -> Results:
    """A run in a process other than the first, which does the parts that process 0 sends."""
    from fedvlm.engines.sharded import serve, together

    work = partial(_prepared, config, objects, None)
    (engine, _, _), _ = together(group, work, _same, not config.model.shard)
    serve(group, engine)
    return Results.read(config.output)


def _prepared(
    config: Config, objects: Objects, progress: Progress | None
) -> tuple[Prepared, dict[str, str]]:
    found = prepare(config, progress, objects=objects)
    from fedvlm.models.spread import settle

    settle(found[0].model)
    return found, described(config, found[0].collator.rows, found[1], budget_of(found[0]))


def _same(prepared: tuple[Prepared, dict[str, str]]) -> str:
    """The part that must be equal in all processes: the initial adapter, the rows, the clients."""
    (engine, _, _), texts = prepared
    return digest(engine.adapter) + "".join(texts.values())


def drive(
    config: Config,
    engine: Engine,
    weights: Mapping[str, float],
    store: stores.Store,
    progress: Progress,
    budget: Budget | None = None,
) -> Results:
    """Runs all rounds after the last finished round, and writes the results.

    Args:
        config: the settings of the run.
        engine: trains and scores the clients.
        weights: client -> its weight in a mean, the number of its training examples.
        store: the run's folder, locked and begun.
        progress: gets the run's events.
        budget: the privacy budget, of a run in this process; None: the run has none, or each site
            keeps its own.
    """
    algorithm, names = engine.algorithm, tuple(weights)
    robust.check(config, algorithm, len(names))
    secure.check(config, algorithm, len(names))
    engine = secure.secured(engine, config, weights, algorithm.init(engine.adapter))
    clients, voids = scored(config, names), secure.Voids()
    forms = Forms(algorithm, engine.adapter, engine.stages, config.wire.max_norm)
    if store.finished() is None:
        state = algorithm.init(engine.adapter)
        untuned = _score_all(engine, Round(0), state, clients)
        answers = engine.answer("untuned", personal_models(engine, Round(0), state, clients))
        if write_answers(store.folder, "untuned", answers):
            store.seal("answers/untuned.jsonl")
        line = {"round": 0, "evaluation": {"personal": untuned[0], "global": untuned[1]}}
        store.commit(0, state, line, {"round": 0})
        progress.round(line, 0.0)
    state, done = store.server(), store.finished() or 0
    patience = Patience(config, engine, store, names, clients)
    for round_ in patience.rounds(budget.rounds if budget else None):
        if round_.number > done:
            began = time.perf_counter()
            rated = clients if round_.evaluate else ()
            noisy = budget.mean(algorithm, state, round_) if budget else None
            state, line = one_round(
                round_,
                engine,
                weights,
                state,
                rated,
                progress,
                forms,
                config.aggregate,
                noisy,
                config.wire.secure,
                config.eval,
            )
            if round_.final and not config.train.tuning:
                line["train_loss"] = {}  # nobody has trained: a loss of 0 would be none
            if budget:
                line["epsilon"] = round(budget.epsilon([*store.lines(), line]), 6)
            line |= patience.told(round_, state)
            seconds = time.perf_counter() - began
            timing = {"round": round_.number, "seconds": seconds, **peak_memory()}
            store.commit(round_.number, state, line, timing, round_.final)
            progress.round(line, seconds)
            voids.after(line)
    config = patience.config
    draw_curves(store.folder, config, store.lines(), names)
    results = write_results(config, names, store, engine)
    progress.finished(results)
    return results


def one_round(
    round_: Round,
    engine: Engine,
    weights: Mapping[str, float],
    state: State,
    clients: Sequence[str],
    progress: Progress,
    forms: Forms,
    aggregate: AggregateConfig | None = None,
    noisy: NoisyMean | None = None,
    summed: bool = False,
    scoring: EvalConfig | None = None,
) -> tuple[State, dict[str, Any]]:
    """One round: downloads, local training, aggregation, and the scores of ``clients``.

    With ``summed``, the engine gives one secure sum instead of uploads. ``scoring`` may leave out
    the scores of models before the aggregation. An ending has none, so its personal models, which
    are scored anyway, stand for those before it.

    Returns:
        The server's next state, and the round's line of metrics.
    """
    scoring = scoring or EvalConfig()
    personal_before = scoring.personal_before or round_.final
    rated = frozenset(clients if personal_before else ())
    visits = round_.visits(weights)
    down = {c: engine.algorithm.send(state, visit) for c, visit in visits.items()}
    tasks = [Task(visit, down[c], c in rated) for c, visit in visits.items()]
    single = Fold(visits, down, forms, aggregate, noisy)
    fold = secure.SumFold(engine) if summed else single

    def ends() -> Iterator[tuple[Visit, Tree]]:
        for reply in engine.train(tasks):
            counts = fold.add(reply)
            if isinstance(reply, Summed):
                continue
            if reply.loss is not None:
                progress.trained(reply.client, reply.loss)
            if counts and reply.client in rated:
                yield visits[reply.client], {}

    # This trains the whole cohort; each pass is scored before the next pass is trained.
    before = engine.score(Models("end", ends()))
    old, state = state, fold.update(state, round_.number)
    line: dict[str, Any] = {
        "round": round_.number,
        "cohort": list(round_.cohort),
        "train_loss": {c: loss for c, loss in fold.losses.items() if loss is not None},
        "bytes_up": fold.bytes_up,
        "bytes_down": {c: saved_bytes(tree) for c, tree in down.items()},
        "steps": fold.steps,
        "passes": fold.passes,
        "evaluation": None,
    }
    line |= fold.told
    if missing := [c for c in round_.cohort if c not in fold.answered]:
        line["missing"] = missing
    if clients:
        # ``old`` is the state after the round before: a site answers again what it answered then.
        earlier, evaluation = Round(round_.number - 1), {}
        if personal_before:
            idle = [c for c in clients if c not in before]
            before |= engine.score(personal_models(engine, earlier, old, idle))
            evaluation["personal_before"] = {c: before[c] for c in clients if c in before}
        if scoring.global_before:
            last = global_models(engine, earlier, old, clients)
            evaluation["global_before"] = engine.score(last)
        personal, everyone = _score_all(engine, round_, state, clients)
        line["evaluation"] = {"personal": personal, "global": everyone} | evaluation
    return state, line


def _score_all(
    engine: Engine,
    round_: Round,
    state: State,
    clients: Sequence[str],
) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """Scores of the personal models and of the global model."""
    return (
        engine.score(personal_models(engine, round_, state, clients)),
        engine.score(global_models(engine, round_, state, clients)),
    )

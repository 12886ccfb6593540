"""The plan of a run: clients, steps, messages and memory, without weights and without writing.

Rows are partitioned like in the run, and rounds come from :func:`fedvlm.rounds.schedule.plan`. The
algorithm itself makes the messages, from an adapter that has shapes and no values.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedvlm import hub
from fedvlm.algorithms.base import NOBODY, Algorithm, Visit
from fedvlm.algorithms.table import find, of_run
from fedvlm.errors import FedVLMError
from fedvlm.planning import footprint
from fedvlm.planning.footprint import Exchange, Exchanges, Footprint
from fedvlm.privacy.canaries import planted
from fedvlm.privacy.units import units_of
from fedvlm.processes import imported
from fedvlm.rounds import noisymean, robust, secure
from fedvlm.rounds.budget import budget
from fedvlm.rounds.prepare import divide, weights_of
from fedvlm.rounds.schedule import plan
from fedvlm.settings.sections import Config
from fedvlm.tree import Tree

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition


@dataclass(frozen=True)
class Spread:
    """Minimum, median and maximum of some numbers."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of one or more numbers."""
        values = list(values)
        return cls(min(values), statistics.median(values), max(values))


@dataclass(frozen=True)
class Forecast:
    """The plan of a run.

    None or an empty dict stands for an unknown value; ``unknown`` gives the reason.

    Attributes:
        config: the settings of the run.
        clients: number of clients.
        names: their names, where the data are at hand.
        cohort: number of clients in a round.
        tuning: whether a final round follows, with all clients and without uploads.
        rows: split -> rows a client.
        steps: optimizer steps a client and round.
        all_steps: optimizer steps of all clients and rounds.
        examples: rows in the batches of these steps, repetitions counted.
        size: the size of the model and the adapter.
        sent: up, down -> bytes a client and round.
        all_sent: up, down -> bytes of all clients and rounds.
        privacy: the content of ``privacy.json``; None without differential privacy.
        unknown: the unknown values, with reasons.
    """

    config: Config
    clients: int | None
    names: tuple[str, ...]
    cohort: int | None
    tuning: bool
    rows: dict[str, Spread]
    steps: Spread | None
    all_steps: int | None
    examples: int | None
    size: Footprint | None
    sent: dict[str, Spread]
    all_sent: dict[str, int]
    privacy: dict[str, Any] | None
    unknown: tuple[str, ...]


def forecast(config: Config) -> Forecast:
    """Plans a run. At most the model's ``config.json`` is downloaded.

    Raises:
        FedVLMError: the run is impossible. An unreachable hub, or hub data missing in the cache,
            is no error: the values that depend on it are unknown.
    """
    imported("torch", "datasets", "peft")
    unknown: list[str] = []
    rows, partition = _divided(config, unknown)
    names = partition.clients if partition else _stated(config)
    algorithm = of_run(config)
    robust.check(config, algorithm, len(names) if names else None)
    noisymean.check(config, algorithm)
    secure.check(config, algorithm, len(names) if names else None)
    rounds = list(plan(config, algorithm, names or (NOBODY.client,)))
    weights = weights_of(config, partition) if partition else dict.fromkeys(names or ("",), 1.0)
    visits = [visit for round_ in rounds for visit in round_.visits(weights).values()]
    model = _model(config, unknown)
    adapter = footprint.stand_in(config) if model is None else footprint.shapes(model, config)
    together = len(rounds[0].cohort) if names else 0
    exchanges = footprint.Exchanges(config, algorithm, adapter, (names or ())[:together])
    found = list(_work(config, partition, names, visits, exchanges))
    steps, seen = [w.steps for w in found], [w.examples for w in found]
    size, sent = None, dict[str, list[int]]()
    if model is not None:
        trains = {id(e): e for e in (w.exchange for w in found)}.values()
        stretches = [stretch for exchange in trains for stretch in exchange.stretches]
        size = footprint.measure(config, model, adapter, stretches)
        sent = {"up": [w.exchange.up for w in found], "down": [w.exchange.down for w in found]}
    whole = names is not None
    return Forecast(
        config=config,
        clients=len(names) if names else None,
        names=tuple(partition.clients) if partition else (),
        cohort=len(rounds[0].cohort) if names else config.train.clients_per_round,
        tuning=algorithm.final,
        rows=_rows(partition),
        steps=None if None in steps else Spread.of(n or 0 for n in steps),
        all_steps=_total(steps) if whole else None,
        examples=_total(seen) if whole else None,
        size=size,
        sent={way: Spread.of(sizes) for way, sizes in sent.items()},
        all_sent={way: sum(sizes) for way, sizes in sent.items()} if whole else {},
        privacy=_budget(config, algorithm, adapter, rows, partition, unknown),
        unknown=tuple(unknown),
    )


def examples(rows: int, size: int, steps: int) -> int:
    """Rows in ``steps`` batches of ``size``; each pass over the rows may end with a short one."""
    passes, rest = divmod(steps, -(-rows // size))
    return passes * rows + min(rest * size, rows)


def _total(values: Sequence[int | None]) -> int | None:
    known = [n for n in values if n is not None]
    return sum(known) if len(known) == len(values) else None


def _divided(config: Config, unknown: list[str]) -> tuple[Any, Partition | None]:
    """The rows and their partition; None for what is not known."""
    from fedvlm.batches import objectives

    on_hub = config.data.path and not Path(os.path.expanduser(config.data.path)).exists()
    try:
        with hub.from_cache():
            rows, partition = divide(config)
            return planted(rows, partition, config, objectives.build(config.objective).pairs)
    except FedVLMError as error:
        if not on_hub or not isinstance(error.__cause__, OSError):
            raise
        hub.check("data.path", str(config.data.path), "data set")
    unknown.append(
        f"rows: data.path '{config.data.path}' is no file or folder here, so it is taken for a "
        "name on the Hugging Face hub; it is not in the local cache, and a dry run downloads no "
        "data. The clients are taken from the configuration"
    )
    return None, None


def _stated(config: Config) -> tuple[str, ...] | None:
    """The names of the clients, as far as the configuration gives them."""
    from fedvlm.data import explicit

    settings = config.partition
    if settings.kind == "column" or (settings.kind == "auto" and settings.column):
        return None
    if settings.lists is not None:
        lists = settings.lists
        return tuple(explicit.read(lists) if isinstance(lists, str) else lists)
    return tuple(f"client-{k}" for k in range(settings.clients))


def _budget(
    config: Config,
    algorithm: Algorithm,
    adapter: Tree,
    rows: Any,
    partition: Partition | None,
    unknown: list[str],
) -> dict[str, Any] | None:
    """The privacy budget of the run; None without one, or where the rows are not known."""
    from fedvlm.data import pool

    if config.privacy.unit is None:
        return None
    if partition is None:
        unknown.append("privacy: epsilon and noise depend on the number of units, so on the rows")
        return None
    if find(config.algorithm.name).pools:
        partition = pool.pooled(partition)
        config = pool.as_long(config, len(partition.clients))
    column = config.privacy.column
    counts = {c: len(units_of(rows, s.train, column)) for c, s in partition.splits.items()}
    found = budget(config, algorithm, adapter, partition.clients, counts)
    return found.described() if found else None


def _rows(partition: Partition | None) -> dict[str, Spread]:
    if partition is None:
        return {}
    counts = partition.counts().values()
    return {split: Spread.of(c[split] for c in counts) for split in ("train", "val", "test")}


class Work(NamedTuple):
    """The work of a client in a round.

    Attributes:
        steps: optimizer steps; None where they depend on unknown rows.
        examples: rows in the batches of these steps; None where the rows are unknown.
        exchange: the client's messages and its stretches of training.
    """

    steps: int | None
    examples: int | None
    exchange: Exchange


def _work(
    config: Config,
    partition: Partition | None,
    names: Sequence[str] | None,
    visits: Iterable[Visit],
    exchanges: Exchanges,
) -> Iterator[Work]:
    """The work of every client in every round."""
    from fedvlm.data import pool

    train = config.train
    if find(config.algorithm.name).pools and names:
        partition = pool.pooled(partition) if partition else None
        train = pool.as_long(config, len(names)).train
    told = train.local_epochs is None  # else the steps depend on the rows
    for visit in visits:
        rows = len(partition.splits[visit.client].train) if partition else None
        usual = train.steps(rows or 0, visit.final) if rows or told or visit.final else None
        exchange = exchanges.of(visit, usual or 1)
        lengths = [usual if s.steps is None else s.steps for s in exchange.stretches]
        steps = _total(lengths) if usual is not None else None
        if rows is None or steps is None:
            yield Work(steps, None, exchange)
        else:
            seen = sum(examples(rows, train.batch_size, n or 0) for n in lengths)
            yield Work(steps, seen, exchange)


def _model(config: Config, unknown: list[str]) -> Any:
    """The model with LoRA attached, on the ``meta`` device; None without access to the hub."""
    from fedvlm.models import load, lora

    try:
        bare = load.load_shapes(config.model)
    except FedVLMError as error:
        local = load.locate(config.model.name)[1]
        if local or not isinstance(error.__cause__, OSError) or hub.refuses(error):
            raise
        unknown.append(
            f"parameters, bytes, memory: the configuration of model.name '{config.model.name}' is "
            "not in the local cache, and the Hugging Face hub does not deliver it"
        )
        return None
    trained = config.lora.model_copy(update={"spare": None})  # spare ranks have values
    return lora.attach(bare, trained, config.seed)

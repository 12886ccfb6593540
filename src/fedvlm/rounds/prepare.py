"""Loads rows, clients, model and engine of a run; writes nothing to the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fedvlm.algorithms.base import Algorithm
from fedvlm.algorithms.table import adapter_of, check_fit, find, of_run
from fedvlm.errors import DataError
from fedvlm.processes import imported, size
from fedvlm.rounds.budget import budget_of
from fedvlm.rounds.objects import Objects
from fedvlm.rounds.progress import Progress, Quiet
from fedvlm.rounds.results import scored
from fedvlm.settings.sections import Config
from fedvlm.store import files
from fedvlm.store import run as stores
from fedvlm.tree import nbytes
from fedvlm.version import __version__

if TYPE_CHECKING:
    from fedvlm.batches.collate import Collator
    from fedvlm.data.partition import Partition
    from fedvlm.engines.shell import Shell
    from fedvlm.models.load import Loaded

Divider = Callable[[Config, Any], "Partition"]
"""Makes the partition of rows."""


def environment() -> dict[str, Any]:
    """Versions and machine of this process."""
    import platform
    from importlib.metadata import version

    import torch

    names = ("torch", "transformers", "peft", "datasets", "numpy", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"fedvlm": __version__, **{n: version(n) for n in names}},
        "processes": size(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def prepare(
    config: Config,
    progress: Progress | None = None,
    divider: Divider | None = None,
    store: stores.Store | None = None,
    objects: Objects | None = None,
) -> tuple[Shell, Partition, stores.Store]:
    """Loads data and model, and checks the run; writes nothing to the run's folder.

    Args:
        config: the settings of the run.
        progress: gets the run's events.
        divider: makes the partition of the rows; None: :func:`partitioned`.
        store: keeps the personal states; None: the store in ``config.output``.
        objects: the objects that a program handed over; None: there are none.

    Raises:
        FedVLMError: the run is impossible; see :func:`fedvlm.run`.
    """
    imported("torch", "datasets", "peft")
    from fedvlm.batches import objectives
    from fedvlm.data import pool
    from fedvlm.engines.choice import engine_class
    from fedvlm.engines.compress import compression
    from fedvlm.models.load import set_threads
    from fedvlm.models.lora import attach, drop_dead

    objects = objects or Objects()
    objects.check(config)
    algorithm = of_run(config, objects.algorithm)
    objective = objectives.build(config.objective)
    rows, partition = divide(config, divider)
    store = store or stores.Store(config.output)
    loaded = objects.loaded(config.model)
    set_threads(loaded.model, config.engine.threads)
    entry, adapter = find(config.algorithm.name), adapter_of(config)
    progress = progress or Quiet()
    collator, partition = usable(config, rows, partition, loaded, divider, progress)
    model = attach(loaded.model, adapter, config.seed)
    probe = collator.training(partition.splits[partition.clients[0]].train[:1])
    model = drop_dead(model, adapter, config.seed, lambda m: objective.terms(m, probe).mean())
    trained, settings = partition, config
    if entry.pools:
        trained = pool.pooled(partition)
        settings = pool.as_long(config, len(partition.clients))
    stages = () if entry.pools else compression(config.wire)  # pooled rows send nothing
    kind = engine_class(config.engine, model)
    engine = kind(model, collator, trained, settings, store, algorithm, stages)
    engine.functions = objects.functions
    check_fit(config.algorithm, engine.adapter)
    if budget := budget_of(engine):
        engine.plans = budget.plans if config.privacy.local else {}
    most = _most_kept(config, partition, algorithm)
    files.check_room(config.output, nbytes([engine.adapter]) * most)
    return engine, partition, store


def visits(config: Config, partition: Partition) -> int:
    """The number of rows that the whole training reads, repetitions counted.

    If it is smaller than the number of rows, encoding ahead does not pay.
    """
    sizes = [len(split.train) for split in partition.splits.values()]
    cohort = min(len(sizes), config.train.clients_per_round or len(sizes))
    steps = sum(map(config.train.steps, sizes)) / len(sizes)
    return int(config.train.rounds * cohort * steps * config.train.batch_size)


def _most_kept(config: Config, partition: Partition, algorithm: Algorithm) -> int:
    """The largest number of adapters that the run's folder may hold.

    Packs hold at most twice the personal states of all clients that are ever trained. Where a round
    does not replace all states, they also hold its new and its merged states. Added to these are
    the exported adapters, and the old and the new state of the server, which may include the memory
    of an optimizer or a mean over rounds.
    """
    everyone = len(partition.clients)
    cohort = min(everyone, config.train.clients_per_round or everyone)
    if algorithm.final:
        cohort = everyone
    trained = min(everyone, cohort * config.train.rounds)
    states = 2 * trained + (2 * cohort if cohort < trained else 0)
    states *= 2 if config.wire.compress in ("int8", "topk") else 1  # the unsent rest of an upload
    uploads = 2 * everyone if config.privacy.canaries else 0  # with their downloads
    return states + uploads + len(scored(config, partition.clients)) + 7


def divide(config: Config, divider: Divider | None = None) -> tuple[Any, Partition]:
    """The rows and their partition into clients."""
    from fedvlm.data.clusters import check_installed

    check_installed(config.partition)
    rows = rows_of(config)
    return rows, (divider or partitioned)(config, rows)


def rows_of(config: Config) -> Any:
    """The rows of a run."""
    from fedvlm.batches import objectives
    from fedvlm.data.sources import load_rows

    pairs = objectives.build(config.objective).pairs
    return load_rows(config.data, config.seed, pairs=pairs, by=config.partition.column)


def partitioned(config: Config, rows: Any) -> Partition:
    """The partition of rows into clients.

    Raises:
        DataError: the rows do not allow it, or a scored client has no row to score.
    """
    from fedvlm.data.partition import make_partition

    partition = make_partition(rows, config)
    split, clients = config.eval.split, scored(config, partition.clients)
    empty = [c for c in clients if not len(getattr(partition.splits[c], split))]
    if empty:
        raise DataError(
            f"eval.split: {len(empty)} clients, such as '{empty[0]}', have no row in '{split}'; "
            f"raise data.{split}_fraction or partition.min_rows"
        )
    return partition


def usable(
    config: Config,
    rows: Any,
    partition: Partition,
    loaded: Loaded,
    divider: Divider | None,
    progress: Progress,
) -> tuple[Collator, Partition]:
    """Batches of the rows that the model can take, and the partition of these rows.

    Canaries have their wrong answers in the batches, and the partition lacks those that are out.

    Args:
        config: the settings of the run.
        rows: the rows.
        partition: their partition.
        loaded: the model and its processor.
        divider: makes the partition again if rows are left out.
        progress: gets the number of checked rows.

    Raises:
        DataError: the model cannot take some rows, and ``data.on_error`` is not ``skip``.
    """
    from fedvlm.batches import objectives
    from fedvlm.batches.collate import Collator
    from fedvlm.data import pool
    from fedvlm.data.columns import name_of
    from fedvlm.data.pictures import Pictures
    from fedvlm.data.unusable import without
    from fedvlm.privacy.canaries import planted

    pairs, names = objectives.build(config.objective).pairs, find(config.algorithm.name).names
    while True:
        asked, trained = planted(rows, partition, config, pairs)
        asked = pool.named(asked, partition) if names else asked
        collator = Collator(
            asked,
            loaded,
            max_length=config.data.max_length,
            new_tokens=config.eval.max_new_tokens,
            pairs=pairs,
            pictures=Pictures.of(config.data),
        )
        ahead = visits(config, trained) >= len(rows)
        budget = config.data.cache * 2**20 if ahead else 0
        bad = collator.check(budget, progress.encoded, progress.checked)
        if not bad:
            return collator, trained
        rows = without(rows, bad, name_of(config.data), config.data.on_error)
        partition = (divider or partitioned)(config, rows)


def weights_of(config: Config, partition: Partition) -> dict[str, float]:
    """Client -> the number of its training rows; 1 under differential privacy, which hides it."""
    from fedvlm.data import pool

    if config.privacy.unit is not None:
        return dict.fromkeys(partition.clients, 1.0)
    pools = find(config.algorithm.name).pools
    return (pool.pooled(partition) if pools else partition).weights

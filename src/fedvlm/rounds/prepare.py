"""Loads what a run needs: rows, clients, model, engine; nothing is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedvlm.algorithms.table import TABLE, build, check_share
from fedvlm.errors import DataError
from fedvlm.processes import size
from fedvlm.rounds.progress import Progress, Quiet
from fedvlm.rounds.results import scored
from fedvlm.settings.sections import Config
from fedvlm.store import run as stores
from fedvlm.tree import nbytes
from fedvlm.version import __version__

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition
    from fedvlm.engines.reference import ReferenceEngine


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
    divided: tuple[Any, Partition] | None = None,
    store: stores.Store | None = None,
) -> tuple[ReferenceEngine, Partition, stores.Store]:
    """Loads data and model, and checks that the run can be done; writes nothing to its folder.

    Args:
        config: of the run.
        progress: told what happens.
        divided: the rows, and who has which, where they are there already.
        store: keeps the personal states; that of ``config.output`` unless given.

    Raises:
        FedVLMError: it cannot; see :func:`run`.
    """
    from fedvlm.batches import objectives
    from fedvlm.batches.collate import Collator
    from fedvlm.data import pool
    from fedvlm.engines.choice import engine_class
    from fedvlm.models.load import load_model, set_threads
    from fedvlm.models.lora import attach, drop_dead

    objective = objectives.build(config.objective)
    rows, partition = divided or divide(config)
    store = store or stores.Store(config.output)
    loaded = load_model(config.model)
    set_threads(loaded.model, config.engine.threads)
    entry, adapter = TABLE[config.algorithm.name], config.adapter
    rows = pool.named(rows, partition) if entry.names else rows
    model = attach(loaded.model, adapter, config.seed)
    limit = config.data.max_length
    collator = Collator(rows, loaded, max_length=limit, pairs=objective.pairs)
    if config.data.cache and visits(config, partition) >= len(rows):
        told = (progress or Quiet()).encoded
        collator.encode_ahead(config.data.cache * 2**20, told)
    probe = collator.training(partition.splits[partition.clients[0]].train[:1])
    model = drop_dead(model, adapter, config.seed, lambda m: objective.terms(m, probe).mean())
    trained, settings = partition, config
    if entry.pools:
        trained = pool.pooled(partition)
        settings = pool.as_long(config, len(partition.clients))
    engine = engine_class(config.engine, model)(model, collator, trained, settings, store)
    check_share(config.algorithm, engine.adapter)
    stores.check_room(config.output, nbytes([engine.adapter]) * _most_kept(config, partition))
    return engine, partition, store


def visits(config: Config, partition: Partition) -> int:
    """How many rows the cohorts' training takes: fewer than there are need no encoding ahead."""
    sizes = [len(split.train) for split in partition.splits.values()]
    cohort = min(len(sizes), config.train.clients_per_round or len(sizes))
    steps = sum(map(config.train.steps, sizes)) / len(sizes)
    return int(config.train.rounds * cohort * steps * config.train.batch_size)


def _most_kept(config: Config, partition: Partition) -> int:
    """How many adapters a run's folder may come to hold.

    Twice the personal states of all who are ever trained, as packs keep them, and a round's new and
    merged ones where it does not replace all; the exported ones; the server's state, old and new,
    with what an optimizer or a mean over rounds remembers.
    """
    everyone = len(partition.clients)
    cohort = min(everyone, config.train.clients_per_round or everyone)
    if build(config.algorithm, config.lora).final:
        cohort = everyone
    trained = min(everyone, cohort * config.train.rounds)
    states = 2 * trained + (2 * cohort if cohort < trained else 0)
    states *= 2 if config.wire.compress in ("int8", "topk") else 1  # with what is not sent yet
    return states + len(scored(config, partition.clients)) + 7


def divide(config: Config) -> tuple[Any, Partition]:
    """The rows, and who has which."""
    from fedvlm.batches import objectives
    from fedvlm.data.clusters import check_installed
    from fedvlm.data.partition import make_partition
    from fedvlm.data.sources import load_rows

    check_installed(config.partition)
    rows = load_rows(config.data, config.seed, pairs=objectives.build(config.objective).pairs)
    partition = make_partition(rows, config)
    split, clients = config.eval.split, scored(config, partition.clients)
    empty = [c for c in clients if not len(getattr(partition.splits[c], split))]
    if empty:
        raise DataError(
            f"eval.split: {len(empty)} clients have no row in '{split}', '{empty[0]}' first; raise "
            f"data.{split}_fraction or partition.min_rows"
        )
    return rows, partition


def _weights(config: Config, partition: Partition) -> dict[str, float]:
    """Client -> the number of rows that it trains on."""
    from fedvlm.data import pool

    pools = TABLE[config.algorithm.name].pools
    return (pool.pooled(partition) if pools else partition).weights

"""The sites' side: small sites, and the message that the server gets from each of them.

The rounds are those of the package: its engine, algorithms, compression and DP-SGD. The server of
these rounds keeps what it has sent and what it has got, as any server can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedvlm.algorithms.base import Visit
from fedvlm.config import load
from fedvlm.data.partition import Partition, Split
from fedvlm.engines.cohort import CohortEngine
from fedvlm.engines.wire import Forms, Task
from fedvlm.privacy.chance import Chance, System
from fedvlm.privacy.plan import Plan
from fedvlm.rounds.fold import Fold
from fedvlm.rounds.prepare import prepare
from fedvlm.settings.sections import Config
from fedvlm.tree import Tree, change

RATES = {"sgd": 0.1, "adamw": 3e-3}  # learning rates; that of AdamW is the default of a run
CLIP = 0.1  # largest norm of a row's gradient under DP-SGD, the default of a run


@dataclass(frozen=True)
class Source:
    """The model and the rows.

    Attributes:
        model: ``tiny``, or the folder of an Idefics3 model.
        data: a file of rows; None: the bundled scenes.
        rows: the training rows of all sites together.
        others: the number of rows that belong to no site. The server may know them.
        seed: of the rows and the adapter.
        target: the adapted layers.
    """

    model: str = "tiny"
    data: str | None = None
    rows: int = 20
    others: int = 200
    seed: int = 0
    target: str = "all-linear"


@dataclass(frozen=True)
class Case:
    """The settings of an observed upload.

    Attributes:
        algorithm: its name.
        optimizer: ``sgd`` or ``adamw``.
        steps: optimizer steps of a round. Each step takes all rows of a site.
        rows: training rows of each site.
        rank: of the adapter.
        round: the observed round, from 1.
        compress: the compression of uploads.
        noise: DP-SGD with this standard deviation of the noise over the clipping norm; 0: clipping
            without noise; None: no DP-SGD.
    """

    algorithm: str = "lora"
    optimizer: str = "sgd"
    steps: int = 1
    rows: int = 1
    rank: int = 8
    round: int = 1
    compress: str = "none"
    noise: float | None = None


@dataclass(frozen=True)
class Observed:
    """What the server holds about one site after a round, and the truth, which it does not hold.

    Attributes:
        begin: the model of the site as far as the server can compute it, from the initial adapter
            and the download. A site that keeps a factor has another one.
        moved: the upload minus the download.
        rows: the site's training rows (the truth).
    """

    begin: Tree
    moved: Tree
    rows: np.ndarray


@dataclass
class Kept:
    """The sites' states, in memory."""

    folder: Path
    states: dict[str, Tree] = field(default_factory=dict)

    def personal(self, clients: Sequence[str]) -> list[Tree]:
        return [dict(self.states.get(client, {})) for client in clients]

    def keep(self, round_: int, position: int, kept: Mapping[str, Tree]) -> None:
        self.states |= kept


def settings(source: Source, case: Case, folder: Path) -> Config:
    """The configuration of a run."""
    count = source.rows + source.others
    data: dict[str, Any] = {"max_rows": count}
    if source.data:
        data["path"] = source.data
    else:
        data["scenes"] = {"style": "iid", "sites": 4, "rows": -(-count // 4)}
    return load(
        {
            "output": str(folder / "run"),
            "seed": source.seed,
            "model": {"name": source.model, "dtype": "float32", "device": "cpu"},
            "data": data,
            "lora": {"rank": case.rank, "alpha": 2 * case.rank, "target": source.target},
            "algorithm": {"name": case.algorithm},
            "train": {
                "rounds": case.round,
                "local_steps": case.steps,
                "batch_size": max(8, case.rows),
                "optimizer": case.optimizer,
                "lr": RATES[case.optimizer],
                "average": "none",
            },
            "wire": {"compress": case.compress},
            "engine": {"threads": 1, "cache": 0},
        }
    )


def divided(rows: np.ndarray, each: int) -> Partition:
    """A partition that gives ``each`` of the rows to every site, in order."""
    none = np.array([], dtype=np.int64)
    splits = {
        f"site-{k:03d}": Split(rows[first : first + each], none, none)
        for k, first in enumerate(range(0, len(rows), each))
    }
    return Partition("explicit", "", tuple(splits), splits, {}, ())


def ready(source: Source, case: Case, folder: Path, chance: Chance | None = None) -> CohortEngine:
    """The engine of a run that has not begun.

    Args:
        source: the model and the rows.
        case: the settings.
        folder: for files of the run.
        chance: the source of the noise; None: the operating system.
    """

    def divider(config: Config, rows: Any) -> Partition:
        return divided(order(source, len(rows))[: source.rows], case.rows)

    engine: Any
    engine, partition, _ = prepare(
        settings(source, case, folder), divider=divider, store=Kept(folder)
    )
    if case.noise is not None:
        plan = Plan(case.rows, case.rows, case.noise, CLIP, delta=1e-5, budget=1.0)
        engine.plans = dict.fromkeys(partition.clients, plan)  # a rate of 1: every row, every step
        engine.chance = chance or System()
    return engine


def order(source: Source, count: int) -> np.ndarray:
    """The rows in random order: first those of the sites, then those that belong to no site."""
    return np.random.default_rng(source.seed).permutation(count)


def observe(engine: CohortEngine) -> list[Observed]:
    """Runs all rounds; returns what the server holds about each site after the last one."""
    algorithm, last = engine.algorithm, engine.config.train.rounds
    forms, state = Forms(algorithm, engine.adapter, engine.stages), algorithm.init(engine.adapter)
    weights = engine.partition.weights
    found: list[Observed] = []
    for number in range(1, last + 1):
        visits = {c: Visit(c, w, 1.0, number) for c, w in weights.items()}
        downs = {c: algorithm.send(state, visit) for c, visit in visits.items()}
        fold = Fold(visits, downs, forms)
        for reply in engine.train([Task(visit, downs[c]) for c, visit in visits.items()]):
            fold.add(reply)
            if number == last:
                down, visit = downs[reply.client], visits[reply.client]
                upload = forms.received(visit, down, reply.upload, reply.weight)
                begin = algorithm.model(engine.adapter, down, {})
                rows = engine.partition.splits[reply.client].train
                found.append(Observed(begin, change(down, upload), rows))
        state = fold.update(state, number)
    return found

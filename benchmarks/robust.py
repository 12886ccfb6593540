"""One liar in five, and the server's means: scores of the honest clients' models.

Five clients of the bundled scenes train FedAvg of both factors (`lora`) on the bundled model. The
last client may lie: its upload is the download minus ten times its change (`backwards`), the
download plus noise of the norm of its change (`noise`), or plus 1000 times its change (`huge`). The
server takes the plain mean, shrinks large changes (`norm`), or trims (`trimmed`). Each row has the
mean loss and exact match of the shared model on the held-out rows of the four honest clients.

    python benchmarks/robust.py [--quick] [--seeds 0,1] [--cases none:norm,backwards:norm]

The last line is `RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from _common import environment
from fedvlm.config import load
from fedvlm.engines.base import Models
from fedvlm.engines.wire import Forms, Reply, Task, norm
from fedvlm.rounds.fold import Fold
from fedvlm.rounds.prepare import prepare
from fedvlm.rounds.schedule import plan, standing
from fedvlm.settings.aggregate import AggregateConfig
from fedvlm.tree import Tree, change

SITES = 5
LIAR = f"site-{SITES - 1}"
SETTINGS: dict[str, Any] = {
    "data": {"scenes": {"sites": SITES, "rows": 40}},
    "algorithm": {"name": "lora"},
    "train": {"rounds": 6, "local_steps": 5, "batch_size": 4, "average": "none"},
    "eval": {"max_new_tokens": 8, "max_rows": 10},
}
Lie = Callable[[Tree, torch.Generator], Tree]
"""``(change, draw) -> change``"""


def noise(moved: Tree, draw: torch.Generator) -> Tree:
    """Random numbers of the same norm."""
    drawn = {n: torch.randn(t.shape, generator=draw) for n, t in moved.items()}
    share = norm(moved) / norm(drawn)
    return {n: share * t for n, t in drawn.items()}


LIES: dict[str, Lie] = {
    "none": lambda moved, draw: moved,
    "backwards": lambda moved, draw: {n: -10 * t for n, t in moved.items()},
    "noise": noise,
    "huge": lambda moved, draw: {n: 1000 * t for n, t in moved.items()},
}


CASES = ",".join(f"{lie}:{kind}" for lie in LIES for kind in ("mean", "norm", "trimmed"))


class Kept:
    """The clients' states, in memory."""

    def __init__(self, folder: Path):
        self.folder, self.states = folder, dict[str, Tree]()

    def personal(self, clients):
        return [dict(self.states.get(client, {})) for client in clients]

    def keep(self, round_, position, kept):
        self.states |= kept


def lying(replies: Iterator[Reply], down: Tree, lie: Lie, seed: int) -> Iterator[Reply]:
    """The replies of a round, with the liar's upload replaced."""
    draw = torch.Generator().manual_seed(seed)
    for reply in replies:
        if reply.client == LIAR:
            moved = lie(change(down, reply.upload), draw)
            reply = replace(reply, upload={n: t + moved[n] for n, t in down.items()})
        yield reply


def trained(engine: Any, weights: dict[str, float], lie: str, settings: AggregateConfig) -> Any:
    """Runs all rounds.

    Returns:
        The mean loss and exact match over the honest clients, and the number of shrunken uploads of
        honest clients and of the liar.
    """
    algorithm, config = engine.algorithm, engine.config
    engine.store = Kept(engine.store.folder)
    forms, state = Forms(algorithm, engine.adapter), algorithm.init(engine.adapter)
    count = {"honest": 0, "liar": 0}
    for round_ in plan(config, algorithm, tuple(weights)):
        visits = round_.visits(weights)
        down = {c: algorithm.send(state, visit) for c, visit in visits.items()}
        fold = Fold(visits, down, forms, settings)
        replies = engine.train([Task(visit, down[c]) for c, visit in visits.items()])
        seed = 1000 * config.seed + round_.number
        replies = lying(replies, down[LIAR], LIES[lie], seed) if lie != "none" else replies
        for reply in replies:
            fold.add(reply)
        state = fold.update(state, round_.number)
        for client in fold.bounded:
            count["liar" if client == LIAR and lie != "none" else "honest"] += 1
    last = standing(config, algorithm)
    visits = [last.visit(c) for c in weights if c != LIAR]
    scores = engine.score(Models("global", [(v, algorithm.send(state, v)) for v in visits]))
    means = [statistics.mean(s[m] for s in scores.values()) for m in ("loss", "exact_match")]
    return *means, count["honest"], count["liar"]


def kinds(bound: float | None, trim: float | None) -> dict[str, AggregateConfig]:
    """Name -> settings of the server."""
    usual = AggregateConfig()
    return {
        "mean": AggregateConfig(kind="mean"),
        "norm": usual.model_copy(update={"bound": bound} if bound else {}),
        "trimmed": AggregateConfig(kind="trimmed", trim=trim or usual.trim),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds of one case")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--styles", default="iid,concept")
    parser.add_argument("--cases", default=CASES, help="LIE:KIND, ...")
    parser.add_argument("--bound", type=float, help="of norm")
    parser.add_argument("--trim", type=float, help="of trimmed")
    parser.add_argument("--set", nargs="*", default=[], help="settings of a run, KEY=VALUE")
    options = parser.parse_args()
    seeds, styles, cases = (
        text.split(",") for text in (options.seeds, options.styles, options.cases)
    )
    short = []
    if options.quick:
        seeds, styles, short = ["0"], ["iid"], ["train.rounds=1"]
        cases = ["none:mean", "backwards:norm"]
    losses: dict[tuple[str, str], list[float]] = {}
    print(environment())
    print("style    seed lie        kind     loss   exact   shrunk: honest, liar   seconds")
    for seed, style in itertools.product(seeds, styles):
        with tempfile.TemporaryDirectory() as folder:
            words = [f"seed={seed}", f"data.scenes.style={style}", f"output={folder}/run"]
            config = load(SETTINGS, *words, *short, *options.set)
            engine, partition, _ = prepare(config, store=Kept(Path(folder)))
            for lie, kind in (case.split(":") for case in cases):
                began = time.process_time()
                settings = kinds(options.bound, options.trim)[kind]
                loss, exact, honest, liar = trained(engine, partition.weights, lie, settings)
                losses.setdefault((lie, kind), []).append(loss)
                print(
                    f"{style:<8} {seed:>4} {lie:<10} {kind:<8} {loss:5.3f}  {exact:6.1%}  "
                    f"{honest:>8} {liar:>12} {time.process_time() - began:>16.1f}",
                    flush=True,
                )
    means = {key: statistics.mean(found) for key, found in losses.items()}
    if {("none", "mean"), ("backwards", "norm")} <= means.keys():
        ratio = means["backwards", "norm"] / means["none", "mean"]
        print(f"RATIO {ratio:.2f} loss with a liar and norm over loss of five honest clients")


if __name__ == "__main__":
    main()

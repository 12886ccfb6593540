"""The privacy audit: does it find an overfitted run, and a noise that is too small?

Two sites of the bundled scenes train the language layers of the bundled model, with 500 canaries.
The cases are:

- `overfit`: FedAvg without differential privacy, until the rows are known by heart.
- `private`: DP-SGD of B, epsilon 3, two steps of SGD with all units. The attacker's best case.
- `mutant`: the same, with a tenth of the noise, while the accounting stays as it is.
- `trained`: DP-SGD of A and B with AdamW, epsilon 3, forty steps on a quarter of the units.

    python benchmarks/audit.py [--quick] [--cases overfit,mutant] [--seeds 0-19]

Each row has the lower bounds of epsilon at 95 %, and AUC and TPR at 1 % FPR of the better attack.
The last line is `RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from _common import environment
from fedvlm.after.audit import audit
from fedvlm.privacy import chance
from fedvlm.rounds.federate import run

EPSILON = 3.0
COMMON: dict[str, Any] = {
    "data": {
        "scenes": {"sites": 2, "rows": 320, "style": "iid"},
        "test_fraction": 0.1,
        "val_fraction": 0.0,
    },
    "lora": {"target": "language"},
    "train": {"average": "none"},
    "eval": {"every": 0, "max_rows": 2, "max_new_tokens": 2},
    "engine": {"threads": 1},
    "privacy": {"canaries": 500},
}
PRIVATE = {"unit": "row", "epsilon": EPSILON, "delta": 1e-5, "clip": 0.1}
STEPS = {
    "algorithm": {"name": "ffa"},
    "lora": {"rank": 4},
    "train": {
        "rounds": 1,
        "local_steps": 2,
        "batch_size": 500,
        "optimizer": "sgd",
        "lr": 0.1,
        "max_grad_norm": None,
    },
    "privacy": PRIVATE,
}
CASES: dict[str, dict[str, Any]] = {
    "overfit": {
        "algorithm": {"name": "lora"},
        "lora": {"rank": 16, "alpha": 32},
        "train": {"rounds": 5, "local_epochs": 4, "batch_size": 16, "lr": 0.005},
    },
    "private": STEPS,
    "mutant": STEPS,
    "trained": {
        "algorithm": {"name": "lora"},
        "lora": {"rank": 4},
        "train": {"rounds": 8, "local_steps": 5, "batch_size": 32, "lr": 0.01},
        "privacy": PRIVATE,
    },
}
QUICK = {"scenes": {"rows": 40}}


@contextlib.contextmanager
def weak(share: float) -> Iterator[None]:
    """A defect: the noise has only a share of its standard deviation."""

    whole = chance.gaussian

    def drawn(source: chance.Chance, count: int, deviation: float) -> Any:
        return whole(source, count, share * deviation)

    with mock.patch.object(chance, "gaussian", drawn):
        yield


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """The trees as one; later ones win."""
    whole: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = merged(whole[key], value) if both else value
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="30 canaries, one seed")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seeds", default="0-2", help="first-last")
    parser.add_argument("--set", nargs="*", default=[], help="settings of a run, KEY=VALUE")
    options = parser.parse_args()
    logging.getLogger("fedvlm").setLevel(logging.ERROR)
    first, _, last = options.seeds.partition("-")
    seeds, short = range(int(first), int(last or first) + 1), list(options.set)
    if options.quick:
        seeds = range(1)
        short += ["data.scenes.rows=40", "privacy.canaries=30", "train.rounds=1"]
    found: dict[str, list[float]] = {}
    print(environment())
    print("case     seed  upload  global  personal     AUC   TPR    seconds: run, audit")
    for case in options.cases.split(","):
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                began = time.process_time()
                settings = merged(COMMON, CASES[case], {"seed": seed, "output": f"{folder}/run"})
                with weak(0.1) if case == "mutant" else contextlib.nullcontext():
                    run(settings, *short)
                trained = time.process_time()
                result = audit(f"{folder}/run")
            one = max(
                (f for own in result.views.values() for f in own.values()),
                key=lambda finding: finding.best.epsilon,
            )
            gc.collect()  # models lie in circles of references
            bounds = [result.bounds.get(v, 0.0) for v in ("upload", "global", "personal")]
            found.setdefault(case, []).append(max(bounds))
            low = "  ".join(f"{bound:6.2f}" for bound in bounds)
            print(
                f"{case:<8} {seed:>4}  {low}    {one.auc:6.3f} {one.tpr:6.1%} "
                f"{trained - began:>12.1f} {time.process_time() - trained:>6.1f}",
                flush=True,
            )
    for case, bounds in found.items():
        above = sum(bound > EPSILON for bound in bounds)
        print(
            f"{case}: largest bound {max(bounds):.2f}, smallest {min(bounds):.2f}, above "
            f"{EPSILON:g} in {above} of {len(bounds)} runs"
        )
    if {"mutant", "private"} <= found.keys():
        gap = statistics.mean(found["mutant"]) - statistics.mean(found["private"])
        print(f"RATIO {gap:.2f} mean bound with a tenth of the noise minus that with all of it")


if __name__ == "__main__":
    main()

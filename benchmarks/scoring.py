"""Scoring: answers written on from the losses' pass, and all answers written anew, as in 0.1.0.

Sites of a trained run score their untuned, global and personal models on held-out rows. One side
computes the losses, generates every answer from its prompt, runs every adapter, and takes the rows
in their order. The other side is the cohort engine as it is: an answer that follows from the losses
is not decoded, other answers are written on from the keys and values of the losses' pass, rows that
have ended leave the batch, adapters that change nothing are off, and rows with answers of like
length share a batch. The answers must be the same texts, and the losses the same numbers to 1e-5.
Time is CPU time of one thread, by turns.

    python benchmarks/scoring.py [--quick] [--repeats 5] [--data vqarad.parquet --model SMOL]

With `--data` and `--model`, the sites are the values of the column `site`. The last line is
`RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

import fedvlm
from _common import environment, paired
from fedvlm.after.opened import open_run
from fedvlm.engines import cohort
from fedvlm.rounds.prepare import prepare
from fedvlm.tree import Tree

SCENES: dict[str, Any] = {
    "data": {"scenes": {"style": "label", "sites": 4, "rows": 200}},
    "train": {"rounds": 6, "local_steps": 5},
    "eval": {"every": 0, "max_rows": 48},
    "engine": {"threads": 1},
}
REAL: dict[str, Any] = {
    "data": {"max_rows": 600, "val_fraction": 0.1},
    "partition": {"kind": "column", "column": "site"},
    "lora": {"target": r"text_model\.layers\.2\d\."},
    "train": {"rounds": 8, "local_steps": 5, "batch_size": 4, "lr": 0.002},
    "eval": {"every": 0, "max_rows": 32, "max_new_tokens": 8},
    "engine": {"threads": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two sites, four rows, one turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--data", help="parquet file with the columns of vqarad.parquet")
    parser.add_argument("--model", help="folder of the model for these data")
    options = parser.parse_args()
    settings, own = SCENES, []
    if options.data:
        settings = REAL
        own = [f"data.path={options.data}", f"model.name={options.model or 'tiny'}"]
    if options.quick:
        options.repeats = 1
        own += ["data.scenes.sites=2", "data.scenes.rows=24", "train.rounds=1", "eval.max_rows=4"]
    print(environment())
    with tempfile.TemporaryDirectory() as folder:
        output = f"output={folder}/run"
        fedvlm.run(settings, *own, output, report=False)
        opened = open_run(f"{folder}/run")
        config = fedvlm.load_config(settings, *own, f"output={folder}/again")
        engine = prepare(config)[0]
        models = adapters(opened)
        ratios = [measured(engine, kind, trees, options.repeats) for kind, trees in models.items()]
    print(
        f"RATIO {statistics.median(ratios):.2f} CPU time with all answers written anew / written on"
    )


def adapters(opened: Any) -> dict[str, dict[str, Tree]]:
    """Kind of model -> client -> its adapter."""
    clients = opened.clients
    both = {"global_": False, "untuned": False, "every": False}
    (whole,) = opened.chosen(**{**both, "global_": True}).values()
    personal = opened.chosen(clients, **both).values()
    return {
        "untuned": dict.fromkeys(clients, opened.initial),
        "global": dict.fromkeys(clients, whole),
        "personal": dict(zip(clients, personal, strict=True)),
    }


def measured(engine: Any, kind: str, trees: Mapping[str, Tree], repeats: int) -> float:
    """Measures one kind of model and prints it; the ratio of the medians."""
    found: dict[str, Any] = {}

    def side(name: str) -> float:
        engine._answers.clear()
        engine._untuned._kept.clear()
        began = time.process_time()
        with as_before(engine) if name == "anew" else contextlib.nullcontext():
            found[name] = engine.answers(trees.items())
        return time.process_time() - began

    names = ("anew", "on")
    taken = paired({name: lambda name=name: side(name) for name in names}, repeats + 1)
    slow, fast = (statistics.median(taken[name][1:] or taken[name]) for name in names)
    rows = [
        (one, other)
        for client, answers in found["anew"].items()
        for one, other in zip(answers, found["on"][client], strict=True)
    ]
    same = sum(one["prediction"] == other["prediction"] for one, other in rows)
    gap = max(abs(one["loss"] - other["loss"]) for one, other in rows)
    right = sum(one["prediction"] == one["reference"] for one, _ in rows)
    print(
        f"{kind:<9} {len(rows)} rows, {right} as expected: anew {slow:.2f} s, written on "
        f"{fast:.2f} s, ratio {slow / fast:.2f}; same texts {same}, losses within {gap:.0e}",
        flush=True,
    )
    return slow / fast


@contextlib.contextmanager
def as_before(engine: Any) -> Iterator[None]:
    """The engine scores as that of 0.1.0 did."""
    unsorted = np.zeros_like(engine.collator.letters)
    with (
        patch.object(cohort, "foretold", lambda model, answers, *_: [None] * len(answers)),
        patch.object(cohort, "reading", lambda *_: contextlib.nullcontext([])),
        patch.object(cohort, "silent", lambda tree: False),
        patch.object(engine.collator, "letters", unsorted),
    ):
        yield


if __name__ == "__main__":
    main()

"""Speed of the cohort engine against the reference engine: the training of a round.

    python benchmarks/engine.py [--quick] [--model tiny,mid] [--target language] [--profile]

Both engines train the same clients on the same batches from the same adapters, by turns in one
process. Each engine runs with the number of threads that suits it best. A third column is the
floor: the same rows through the frozen model without adapters, forward and back to the inputs. The
script prints medians of the repeats and the ratios of pairs. The last line is
`RATIO <number> <what>`.

Models: `tiny` is the bundled model with the bundled scenes. `mid` has the shape of Florence-2-base
(231 M parameters, random weights) and synthetic rows of 32 tokens in and out. Its pictures have 192
pixels a side instead of 768, and 37 image tokens instead of 577. Pictures of full size have 16
times as many patches, too many for two cores and ten minutes. With `language` the vision tower
sees each picture only once.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import _shapes
import _sides
import fedvlm
from _common import Work, best_threads, environment, paired, ratio, seconds
from _profile import profile, show
from fedvlm.models.load import load_model
from fedvlm.rounds.prepare import prepare

ROWS = 24  # scenes of a client, all encoded before the clock starts
MID = 192  # pixels
ENGINES = ("reference", "cohort")


@dataclass(frozen=True)
class Case:
    """One measured setting."""

    model: str
    target: str
    clients: int
    batch: int
    steps: int


FULL = {
    ("tiny", "all-linear"): [(4, 4, 3), (10, 1, 3), (10, 4, 3), (10, 8, 3), (32, 1, 3)],
    ("tiny", "language"): [(4, 4, 3), (10, 1, 3), (10, 4, 3), (10, 8, 3), (32, 1, 3)],
    ("mid", "all-linear"): [(4, 1, 1)],
    ("mid", "language"): [(4, 1, 1), (4, 4, 1), (10, 1, 1)],
}


def sides(case: Case) -> dict[str, Work]:
    """One round of each engine, and the floor for the same rows."""
    found: dict[str, Work] = {}
    for name in ENGINES:
        engine, partition = tiny(name, case) if case.model == "tiny" else mid(name, case)
        found[name] = _sides.training(engine, partition.clients)
        engine.collator.training([i for s in partition.splits.values() for i in s.train])
    bare = load_model(engine.config.model).model if case.model == "tiny" else mid_model()
    return found | {"floor": _sides.floor(bare, engine, partition)}


def tiny(name: str, case: Case) -> tuple[Any, Any]:
    config = fedvlm.load_config(
        {
            "output": tempfile.mkdtemp() + "/run",
            "data": {"scenes": {"sites": case.clients, "rows": ROWS, "style": "concept"}},
            "partition": {"min_rows": 4},
            "lora": {"target": case.target},
            "train": {"batch_size": case.batch, "local_steps": case.steps},
            "engine": {"name": name, "clients": case.clients if name == "cohort" else None},
        }
    )
    engine, partition, _ = prepare(config)
    return engine, partition


def mid_model() -> Any:
    return _shapes.build(_shapes.florence("base", MID), torch.device("cpu"), torch.float32)


def mid(name: str, case: Case) -> tuple[Any, Any]:
    shape = _shapes.florence("base", MID)
    settings = case.clients, case.clients, case.batch, case.steps, case.target
    return _shapes.engine(name, mid_model(), shape, *settings)


def compare(case: Case, repeats: int, profiled: bool) -> float:
    """Prints a row of the table; returns the speed of the cohort engine over the reference."""
    works = sides(case)
    threads = {name: best_threads(work) for name, work in works.items()}

    def turn(name: str) -> float:
        torch.set_num_threads(threads[name])
        return seconds(works[name])

    taken = paired({name: lambda name=name: turn(name) for name in works}, repeats)
    faster, low, high = ratio(taken["reference"], taken["cohort"])
    above, _, _ = ratio(taken["cohort"], taken["floor"])
    steps = case.clients * case.steps
    at = "/".join(str(threads[name]) for name in works)
    per = {name: 1000 * median(times) / steps for name, times in taken.items()}
    print(
        f"{case.model:<5}{case.target:>11}{case.clients:>8}{case.batch:>6}"
        f"{per['reference']:>11.1f}{per['cohort']:>9.1f}{per['floor']:>9.1f}"
        f"{at:>9}{faster:>7.2f}{f'{low:.2f} to {high:.2f}':>14}{above:>9.2f}",
        flush=True,
    )
    if profiled:
        torch.set_num_threads(threads["cohort"])
        show(f"cohort, {case}", profile(works["cohort"], rank=8))
    return faster


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one setting of tiny")
    parser.add_argument("--model", default="tiny,mid", help="default: %(default)s")
    parser.add_argument("--target", default="all-linear,language", help="default: %(default)s")
    parser.add_argument("--clients", type=int, help="only settings with this number of clients")
    parser.add_argument("--batch", type=int, help="only settings with this batch size")
    parser.add_argument(
        "--profile", action="store_true", help="print the cohort engine's time by kind"
    )
    options = parser.parse_args()
    cases = [
        Case(model, target, *rest)
        for (model, target), settings in FULL.items()
        for rest in settings
        if model in options.model.split(",") and target in options.target.split(",")
        if options.clients in (None, rest[0]) and options.batch in (None, rest[1])
    ]
    if options.quick:
        cases = [Case("tiny", "all-linear", 10, 2, 2)]
    if not cases:
        parser.error("no setting is left")
    print(environment())
    print("milliseconds a client's step; ratio: reference / cohort; x floor: cohort / floor")
    head = f"{'model':<5}{'LoRA':>11}{'clients':>8}{'batch':>6}{'reference':>11}{'cohort':>9}"
    print(f"{head}{'floor':>9}{'threads':>9}{'ratio':>7}{'range':>14}{'x floor':>9}")
    found = {case: compare(case, 5, options.profile) for case in cases}
    named = next((c for c in cases if (c.clients, c.batch) == (10, 8)), cases[-1])
    print(
        f"RATIO {found[named]:.2f} cohort engine over reference, {named.model}, {named.target}, "
        f"{named.clients} clients, batch {named.batch}"
    )


if __name__ == "__main__":
    main()

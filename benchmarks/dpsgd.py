"""DP-SGD: the accountant's figures, exact gradients by family, and the cost of a private step.

    python benchmarks/dpsgd.py [--quick] [--smol FOLDER] [--parts noise,gradients,cost]

Three tables:

- noise: the noise for a budget beside that of dp-accounting's own accountant with a ten times finer
  grid, and of pfl-research's PLD where `pfl` is installed.
- gradients: for every family of docs/families.md, the largest relative difference of a unit's
  gradient in the stack and by autograd, one unit at a time, in single and in double precision; and
  of both in single precision to the exact gradient, which is that in double precision.
- cost: CPU time of one thread and memory of a private step over a plain step of one client at the
  same batch, by turns in one process (time) and in processes of their own (memory: the growth of
  the resident set while training).

The last line is `RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import _sides
import fedvlm
from _common import ROOT, Work, environment, paired, ratio
from fedvlm.models import lora
from fedvlm.models.runs import Runs
from fedvlm.privacy.accountant import Spend, epsilon, noise_for
from fedvlm.privacy.plan import Plan
from fedvlm.rounds.prepare import prepare

DELTA = {500: 1e-4, 2000: 1e-5, 10_000: 1e-5}
MECHANISMS = [(500, 32, 400), (2000, 32, 400), (2000, 256, 400), (10_000, 100, 100)]
SIDES = ("plain", "private")


def noise_table(quick: bool) -> None:
    """The noise for a budget, and the epsilon of this noise by others."""
    print(f"{'units':>7}{'batch':>7}{'steps':>7}{'delta':>9}{'budget':>8}{'noise':>9}{'epsilon':>9}"
          f"{'dp-accounting':>15}{'noise, pfl':>12}")  # fmt: skip
    for units, batch, steps in MECHANISMS[:1] if quick else MECHANISMS:
        for budget in (1.0, 3.0, 8.0):
            rate, delta = batch / units, DELTA[units]
            noise = noise_for(rate, steps, budget, delta)
            ours = epsilon([Spend(rate, noise, steps)], delta)
            theirs = by_dp_accounting(rate, noise, steps, delta)
            other = by_pfl(rate, steps, budget, delta)
            print(f"{units:>7}{batch:>7}{steps:>7}{delta:>9.0e}{budget:>8.0f}{noise:>9.4f}"
                  f"{ours:>9.4f}{theirs:>15.4f}{other:>12}", flush=True)  # fmt: skip


def by_dp_accounting(rate: float, noise: float, steps: int, delta: float) -> float:
    """Epsilon by dp-accounting's accountant of events."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    found = PLDAccountant(value_discretization_interval=1e-4)
    found.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    return found.get_epsilon(delta)


def by_pfl(rate: float, steps: int, budget: float, delta: float) -> str:
    """The noise of pfl-research's PLD accountant."""
    try:
        from pfl.privacy.privacy_accountant import PLDPrivacyAccountant
    except ImportError:
        return "not there"
    found = PLDPrivacyAccountant(
        num_compositions=steps,
        sampling_probability=rate,
        mechanism="gaussian",
        epsilon=budget,
        delta=delta,
        value_discretization_interval=1e-3,
    )
    return f"{found.cohort_noise_parameter:.4f}"


def gradient_table(quick: bool) -> float:
    """The largest relative difference of a unit's gradient, by family; returns that in float64."""
    sys.path.insert(0, str(ROOT / "tests"))
    import families

    worst = 0.0
    heads = ("float32", "float64", "ours, exact", "alone, exact")
    print(f"{'family':<16}" + "".join(f"{head:>14}" for head in heads))
    for family in ["smolvlm"] if quick else families.FAMILIES:
        folder = families.folder(family)
        ours, theirs, adapter = gradients(folder, "float32")
        wide, exact, _ = gradients(folder, "float64", adapter)
        found = [apart(ours, theirs), apart(wide, exact), apart(ours, exact), apart(theirs, exact)]
        print(f"{family:<16}" + "".join(f"{gap:>14.1e}" for gap in found), flush=True)
        worst = max(worst, found[1])
    return worst


def apart(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest relative difference, over the units."""
    pairs = zip(some, others, strict=True)
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def gradients(model: str, dtype: str, given: Any = None) -> tuple[list[Any], list[Any], Any]:
    """The gradients of eight units, from the stack and by autograd for one unit alone.

    Args:
        model: folder of the model.
        dtype: of the model and the adapter.
        given: the adapter; None: a random one.

    Returns:
        Both, as float64, and the adapter.
    """
    slow, fast = (engine(name, model, dtype=dtype) for name in ("reference", "cohort"))
    torch.manual_seed(0)
    drawn = {n: t + 0.01 * torch.randn(t.shape).to(t) for n, t in slow.adapter.items()}
    adapter = {n: t.to(slow.adapter[n]) for n, t in (given or drawn).items()}
    units = fast.units("site-0")[:8]
    stacked, _ = fast._gradients(units, adapter, lambda name: True)
    lora.write(slow.params, adapter)
    ours, theirs = [], []
    for k, rows in enumerate(units):
        slow.model.zero_grad()
        for p in slow.params.values():
            p.requires_grad_(True)
        terms = slow._terms(rows)
        (terms.loss / terms.weight).mean().backward()
        ours.append(torch.cat([stacked[n][k].flatten() for n in slow.params]).double())
        theirs.append(torch.cat([p.grad.flatten() for p in slow.params.values()]).double())
    return ours, theirs, adapter


def engine(name: str, model: str, *, batch: int = 8, target: str = "all-linear",
           dtype: str = "float32", rows: int = 24) -> Any:  # fmt: skip
    """An engine of one client by ``ffa`` with a private plan."""
    config = fedvlm.load_config(
        {
            "output": tempfile.mkdtemp() + "/run",
            "model": {"name": model, "device": "cpu", "dtype": dtype},
            "data": {"scenes": {"sites": 2, "rows": rows, "style": "iid"}},
            "partition": {"min_rows": 4},
            "algorithm": {"name": "plora"},
            "lora": {"target": target},
            "train": {"batch_size": batch, "local_steps": 4, "average": "none"},
            "privacy": {"unit": "row", "epsilon": 8, "delta": 1e-4},
            "engine": {"name": name},
        }
    )
    return prepare(config)[0]


def step_of(side: str, model: str, batch: int, target: str) -> tuple[Any, Any]:
    """A round of four steps, plain or private, on the same number of rows; and its engine."""
    found = engine("cohort", model, batch=batch, target=target, rows=2 * batch)
    split = found.partition.splits["site-0"]
    found.partition.splits["site-0"] = replace(split, train=split.train[:batch])
    if side == "plain":
        found.plans = {}
    else:  # all units in every step: exactly as many rows as the plain step
        found.plans = {"site-0": Plan(batch, batch, 1.0, 1.0, 1e-4, 8.0)}
    return _sides.training(found, ["site-0"]), found


def cost_table(cases: list[tuple[str, int, str]], repeats: int) -> float:
    """Prints time and memory; returns the largest ratio of times."""
    print(f"{'model':<8}{'LoRA':>34}{'batch':>6}{'plain ms':>10}{'private ms':>12}{'time':>7}"
          f"{'range':>14}{'plain MB':>10}{'private MB':>12}{'memory':>8}")  # fmt: skip
    most = 0.0
    torch.set_num_threads(1)
    for model, batch, target in cases:
        plain, private = (step_of(side, model, batch, target)[0] for side in SIDES)
        plain(), private()
        turns = {"plain": partial(cpu_seconds, plain), "private": partial(cpu_seconds, private)}
        taken = paired(turns, repeats)
        times, low, high = ratio(taken["private"], taken["plain"])
        grown = {side: memory(side, model, batch, target) for side in SIDES}
        per = {side: 250 * median(found) for side, found in taken.items()}
        name = os.path.basename(model)
        print(f"{name:<8}{target:>34}{batch:>6}{per['plain']:>10.1f}{per['private']:>12.1f}"
              f"{times:>7.2f}{f'{low:.2f} to {high:.2f}':>14}{grown['plain']:>10.0f}"
              f"{grown['private']:>12.0f}{grown['private'] / grown['plain']:>8.2f}",
              flush=True)  # fmt: skip
        most = max(most, times)
    return most


def cpu_seconds(work: Work) -> float:
    """CPU time of this process for a piece of work: other processes disturb it less."""
    began = time.process_time()
    work()
    return time.process_time() - began


def memory(side: str, model: str, batch: int, target: str) -> float:
    """The growth of the resident set of a process that trains, in MB."""
    command = [sys.executable, __file__, "--measure", json.dumps([side, model, batch, target])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure(side: str, model: str, batch: int, target: str) -> None:
    """Prints by how much a round of training lets the resident set grow at its peak, in MB."""
    torch.set_num_threads(1)
    work, found = step_of(side, model, batch, target)
    rows = [int(unit[0]) for unit in found.units("site-0")]
    found.collator.training(rows)
    found.stack.shared.clear()
    found.stack.runs = Runs()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    work()
    print((resident("VmHWM") - before) / 1024)


def resident(name: str) -> float:
    """A line of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one row of each table")
    parser.add_argument("--smol", default="", help="folder of the model of 140 M parameters")
    parser.add_argument("--parts", default="noise,gradients,cost", help="default: %(default)s")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*json.loads(options.measure))
        return
    print(environment())
    parts, most = options.parts.split(","), 0.0
    if "noise" in parts:
        noise_table(options.quick)
    if "gradients" in parts:
        gradient_table(options.quick)
    cases = [("tiny", 8, "all-linear")]
    if not options.quick:
        cases = [("tiny", 32, "all-linear"), ("tiny", 128, "all-linear"), ("tiny", 32, "language")]
    if options.smol:
        cases.append((options.smol, 16, r"text_model\.layers\.2\d\."))
    if "cost" in parts:
        most = cost_table(cases, 2 if options.quick else 7)
    print(f"RATIO {most:.2f} time of a private step over a plain step, largest of the rows above")


if __name__ == "__main__":
    main()

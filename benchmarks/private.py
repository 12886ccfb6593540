"""Utility under differential privacy: accuracy of the algorithms at several budgets.

    python benchmarks/private.py [--quick] [--cells scenes,photos] [--epsilons inf,8,3,1]
        [--algorithms ffa,plora,rolora,local] [--seeds 0,1,2] [--batch 32] [--output runs/private]
        [--tables]

All runs of a cell have the same rows, partition, steps, batches and ending; the learning rate is
the same for all (0.02), chosen at epsilon 8 for `ffa`. Units are rows. Scores are exact match on
each client's test rows. Finished runs are kept and skipped, and killed runs are resumed. `--tables`
prints what is there.

- scenes: the bundled scenes, style label, three sites of 600 rows, 6 rounds of 5 steps.
- photos: CIFAR-10 photographs with questions by `origin_dataset`, 3,000 rows.
- vqarad: 3,515 radiology questions by organ (three sites), the model of 140 M parameters in
  runs/smol, LoRA of rank 2 on the queries and values of its last ten layers, 5 rounds of 2 steps,
  batches of 16, learning rate 0.01; scores are token F1.

The last line is `RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fedvlm
from _common import ROOT, environment
from fedvlm.models.frozen import handed_on

CELLS: dict[str, dict[str, Any]] = {
    "scenes": {"data": {"scenes": {"style": "label", "sites": 3, "rows": 600}}},
    "photos": {
        "data": {"path": str(ROOT.parent / "shared/data/photos.parquet"), "max_rows": 3000},
        "partition": {"kind": "column", "column": "origin_dataset"},
    },
    "vqarad": {
        "data": {"path": str(ROOT.parent / "shared/data/vqarad.parquet"), "val_fraction": 0.1},
        "partition": {"kind": "column", "column": "site"},
        "model": {"name": str(ROOT / "runs/smol")},
        "lora": {
            "target": r"text_model\.layers\.2\d\.self_attn\.(q|v)_proj",
            "rank": 2,
            "alpha": 4,
        },
        "train": {"rounds": 5, "local_steps": 2, "batch_size": 16, "lr": 0.01},
        "eval": {
            "every": 0,
            "max_rows": 32,
            "max_new_tokens": 6,
            "metric": "token_f1",
            "global_before": False,
        },
    },
}
COMMON = {
    "train": {"rounds": 6, "local_steps": 5, "batch_size": 128, "lr": 0.02},
    "lora": {"target": "language", "rank": 4, "alpha": 8},
    "eval": {"every": 0, "max_rows": 96},
    "aggregate": {"kind": "mean"},
    "engine": {"threads": 1},
}
DELTA = 1e-4
SHOWN = ("global", "personal")


def file_of(cell: str, algorithm: str, budget: str, seed: int, output: Path, batch: int) -> Path:
    """The file of a run's result."""
    of_batch = f"-b{batch}" if batch else ""
    return output / f"{cell}-{algorithm}-{budget}-{seed}{of_batch}.json"


def ran(
    cell: str, algorithm: str, budget: str, seed: int, output: Path, batch: int, quick: bool
) -> Any:
    """The result of a run, from its file or from a new run."""
    path = file_of(cell, algorithm, budget, seed, output, batch)
    if path.exists():
        return json.loads(path.read_text())
    settings = {**COMMON, **CELLS[cell], "algorithm": {"name": algorithm}, "seed": seed}
    if batch:
        settings["train"] = {**settings["train"], "batch_size": batch}
    if budget != "inf":
        settings |= {"privacy": {"unit": "row", "epsilon": float(budget), "delta": DELTA}}
    if quick:
        settings["data"] = {"scenes": {"style": "label", "sites": 2, "rows": 40}}
        settings["train"] = {"rounds": 1, "local_steps": 1, "batch_size": 8}
        settings["eval"] = {"every": 0, "max_rows": 4}
    began = time.perf_counter()
    folder = output / path.stem
    begun = (folder / "config.yaml").exists()  # by an earlier start, which was killed
    results = fedvlm.run(settings, f"output={folder}", resume=begun, report=False)
    table = results.table
    found = {
        "scores": {m: results.scores(m) for m in ("untuned", *SHOWN)},
        "rows": table["models"]["personal"]["rows"],
        "steps": table["steps"],
        "privacy": table.get("privacy"),
        "seconds": time.perf_counter() - began,
        "environment": environment(),
    }
    path.write_text(json.dumps(found))
    return found


def rows_of(found: dict[tuple[str, str, str], list[Any]]) -> list[str]:
    """The lines of the table: one for each cell, budget and algorithm."""
    lines = [
        "| cell | epsilon | algorithm | global | personal | untuned | noise to signal | steps | "
        "seeds (rows) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (cell, budget, algorithm), runs in found.items():
        loud = [r["privacy"]["noise_to_signal"] for r in runs if r["privacy"]]
        lines.append(
            f"| {cell} | {'none' if budget == 'inf' else budget} | `{algorithm}` | "
            f"{spread(runs, 'global')} | {spread(runs, 'personal')} | {spread(runs, 'untuned')} | "
            f"{f'{max(loud):.2g}' if loud else ''} | {runs[0]['steps']} | "
            f"{len(runs)} ({sum(r['rows'] for r in runs)}) |"
        )
    return lines


def spread(runs: list[Any], model: str) -> str:
    """Mean over seeds of the mean over clients, in per cent, and its standard error."""
    means = [100 * statistics.mean(r["scores"][model].values()) for r in runs]
    if len(means) == 1:
        return f"{means[0]:.1f}"
    return f"{statistics.mean(means):.1f} ± {statistics.stdev(means) / len(means) ** 0.5:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two tiny runs, kept nowhere else")
    parser.add_argument("--cells", default="scenes,photos", help="default: %(default)s")
    parser.add_argument("--epsilons", default="inf,8,3,1", help="default: %(default)s")
    parser.add_argument("--algorithms", default="ffa,plora,rolora,local")
    parser.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=0, help="rows of a batch; default: the cell's")
    parser.add_argument("--output", type=Path, default=Path("runs/private"))
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args()
    cells, budgets = options.cells.split(","), options.epsilons.split(",")
    names, seeds = options.algorithms.split(","), options.seeds.split(",")
    output = options.output
    if options.quick:
        import tempfile

        output = Path(tempfile.mkdtemp())
        cells, budgets, names, seeds = ["scenes"], ["inf", "8"], ["plora"], ["0"]
    output.mkdir(parents=True, exist_ok=True)
    print(environment())
    found: dict[tuple[str, str, str], list[Any]] = {}
    for seed in seeds:
        for cell in cells:
            if not Path(CELLS[cell]["data"].get("path", "/")).exists():
                print(f"{cell} is left out: {CELLS[cell]['data']['path']} is not there")
                continue
            for budget in budgets:
                for name in names:
                    path = file_of(cell, name, budget, int(seed), output, options.batch)
                    if options.tables and not path.exists():
                        continue
                    one = ran(cell, name, budget, int(seed), output, options.batch, options.quick)
                    found.setdefault((cell, budget, name), []).append(one)
                    means = {m: statistics.mean(one["scores"][m].values()) for m in SHOWN}
                    shown = ", ".join(f"{m} {100 * s:.1f}" for m, s in means.items())
                    if not options.tables:
                        told = f"{cell} {name} epsilon {budget} seed {seed}: {shown}"
                        print(f"{told}, {one['seconds']:.0f} s", flush=True)
    print("\n".join(rows_of(found)))
    pairs = [
        statistics.mean(a["scores"]["personal"].values())
        / statistics.mean(b["scores"]["personal"].values())
        for (cell, budget, name), runs in found.items()
        if budget == "8" and (cell, "inf", name) in found
        for a, b in zip(runs, found[cell, "inf", name], strict=False)
        if any(b["scores"]["personal"].values())
    ]
    ratio = statistics.median(pairs) if pairs else float("nan")
    print(f"RATIO {ratio:.2f} personal accuracy at epsilon 8 over that without privacy, median")


if __name__ == "__main__":
    with handed_on():  # the untuned model's answers, and the features of the pictures
        main()

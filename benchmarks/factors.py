"""Which factor is general, A or B: similarity across sites, and scores when either is shared.

FedSA-LoRA shares A and keeps B personal, FedVLM the reverse. This script measures both sides of the
dispute, by regime and by part of the model (vision, projector, language):

- *Similarity.* Sites train alone from one initial adapter. The similarity of a factor is the mean
  cosine over pairs of sites and over modules: of the trained factor, and of its change. All sites
  start from the same A, so trained A's are alike however little they agree; the change is what the
  sites have learned. The regime ``iid``, where sites differ by chance only, is the reference.
- *Scores.* The personal models' exact match when nothing, A, B or both are shared, and when one
  part shares A and the others B, or the reverse. All have the same steps and the same ending.

    python benchmarks/factors.py                          # regimes of scenes, model tiny
    python benchmarks/factors.py --data F.parquet --by COLUMN --model NAME [--similarity]
    python benchmarks/factors.py --quick                  # a test of the script

Finished runs are kept in ``--output`` and skipped. The script prints Markdown tables; with
``--publish`` it writes them to docs/factors.md. The last line is ``RATIO <number> <what>``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from _common import ROOT, environment
from fedvlm.config import load
from fedvlm.layers import part
from fedvlm.metrics import mean
from fedvlm.rounds import comparison
from fedvlm.rounds.results import Results
from fedvlm.settings.sections import Config
from fedvlm.store.files import load_tree, write_text
from fedvlm.tree import factor, module

PARTS = ("vision", "projector", "language")
REGIMES = {"iid": 0.0, "label": 1.0, "concept": 1.0, "mixed": 1.0}
PAGE = ROOT / "docs" / "factors.md"
MARKS = "<!-- written by benchmarks/factors.py: {} -->", "<!-- end of {} -->"

Share = Mapping[str, str]  # part -> shared factors


def maps() -> dict[str, Share]:
    """The compared share maps by name."""
    found: dict[str, Share] = {
        "nothing": dict.fromkeys(PARTS, "none"),
        "A": dict.fromkeys(PARTS, "A"),
        "B": dict.fromkeys(PARTS, "B"),
        "A and B": dict.fromkeys(PARTS, "AB"),
    }
    for one, other in ("AB", "BA"):
        for name in PARTS:
            rest = {p: other for p in PARTS if p != name}
            found[f"{one} in {name}, {other} elsewhere"] = {name: one, **rest}
    return found


def settings(asked: argparse.Namespace, regime: str) -> dict[str, Any]:
    """The settings of a regime, the same for all share maps."""
    rows, validation, test = 80, 12, 24 if asked.quick else 96
    total = rows + validation + test
    tree: dict[str, Any] = {
        "seed": asked.seed,
        "data": {"val_fraction": validation / total, "test_fraction": test / total},
        "partition": {"min_rows": 4},
        "train": {"rounds": asked.rounds, "local_steps": 5, "batch_size": 4, "lr": asked.rate},
        "eval": {"every": 0, "max_rows": test},
        "engine": {"threads": 1},
    }
    if asked.data:
        tree["model"] = {"name": asked.model}
        tree["data"] = {"path": asked.data, "max_rows": asked.rows}
        tree["partition"] |= {"kind": "column", "column": asked.by}
        tree["eval"] |= {"max_rows": 40, "max_new_tokens": 8}
    else:
        strength = REGIMES[regime]
        tree["data"]["scenes"] = {"style": regime, "strength": strength, "sites": 6, "rows": total}
    if asked.quick:
        tree["train"] |= {"rounds": 2, "local_steps": 2}
        tree["eval"] |= {"max_rows": 2, "max_new_tokens": 2}
    return tree


def runs(asked: argparse.Namespace, regimes: Sequence[str]) -> dict[str, Config]:
    """The runs by name, such as ``mixed: A``."""
    found = {}
    chosen = dict(itertools.islice(maps().items(), 1 if asked.similarity else None))
    for regime, (name, share) in itertools.product(regimes, chosen.items()):
        tree = settings(asked, regime)
        patterns = {f"part:{p}": factors for p, factors in share.items()}
        tree["algorithm"] = {"name": "share", "share": patterns}
        slug = name.replace(" ", "-").replace(",", "")
        tree["output"] = str(Path(asked.output) / f"{regime}-seed-{asked.seed}" / slug)
        found[f"{regime}: {name}"] = load(tree)
    return found


def similarity(folder: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """Part and factor -> mean cosine over sites of the trained factors, and of their changes.

    Args:
        folder: a run in which nothing is shared. Its global adapter is the initial adapter.
    """
    adapters = folder / "adapters"
    begun = load_tree(adapters / "global" / "adapter_model.safetensors")
    ends = [
        load_tree(path / "adapter_model.safetensors") for path in sorted(adapters.glob("client-*"))
    ]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name, start in begun.items():
        key = part(module(name)), factor(name)
        changes = [end[name] - start for end in ends]
        pair = _cosine([end[name] for end in ends]), _cosine(changes)
        found.setdefault(key, []).append(pair)
    return {
        key: (mean(p[0] for p in pairs), mean(p[1] for p in pairs)) for key, pairs in found.items()
    }


def _cosine(tensors: Sequence[torch.Tensor]) -> float:
    """The mean cosine over pairs of tensors."""
    flat = torch.nn.functional.normalize(torch.stack([t.flatten() for t in tensors]), dim=1)
    return statistics.fmean(float(a @ b) for a, b in itertools.combinations(flat, 2))


def alike(found: Mapping[str, Mapping[tuple[str, str], tuple[float, float]]]) -> str:
    """The table of similarities, with a row a regime and part."""
    lines = [
        "| regime | part | A | B | change of A | change of B |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for regime, parts in found.items():
        for name in PARTS:
            if (name, "A") in parts:
                pairs = [parts[name, f] for f in "AB"]
                values = [*(p[0] for p in pairs), *(p[1] for p in pairs)]
                cells = " | ".join(f"{v:.2f}" for v in values)
                lines.append(f"| `{regime}` | {name} | {cells} |")
    return "\n".join(lines)


def scored(found: Mapping[str, Results], regimes: Sequence[str]) -> str:
    """The table of scores, with a row a share map and a column a regime."""
    lines = [
        "| shared | " + " | ".join(f"`{r}`" for r in regimes) + " | steps |",
        "| --- |" + " --- |" * (len(regimes) + 1),
    ]
    for name in maps():
        own = [found.get(f"{r}: {name}") for r in regimes]
        if all(own):
            cells = [f"{100 * r.summary('personal')['mean']:.1f}" for r in own if r]
            steps = {r.table["steps"] for r in own if r}
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {_one(steps)} |")
    return "\n".join(lines)


def _one(steps: set[int]) -> str:
    return f"{steps.pop():,}" if len(steps) == 1 else "unequal"


def main(words: Sequence[str] | None = None) -> int:
    """Runs all share maps in all regimes, and prints the tables."""
    asked = _parser().parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        if asked.quick:
            asked.output, asked.regimes = scratch, ["iid"]
        regimes = [f"{Path(asked.data).stem}-{asked.by}"] if asked.data else asked.regimes
        chosen = runs(asked, regimes)
        left = {name: c for name, c in chosen.items() if not comparison.done(c)}
        comparison.each(comparison.run_one, left, asked.jobs, _tell)
        done = {name: Results.read(c.output) for name, c in chosen.items()}
        cosines = {r: similarity(Path(chosen[f"{r}: nothing"].output)) for r in regimes}
        text = "\n\n".join(_page(asked, done, cosines, regimes))
        print(text)
        if asked.publish:
            _publish(f"{Path(asked.model).name}, {', '.join(regimes)}", text)
        print(f"\nRATIO {_ratio(cosines):.3f} cosine of the changes of A / of B, all parts")
    return 0


def _page(
    asked: argparse.Namespace,
    done: Mapping[str, Results],
    cosines: Mapping[str, Any],
    regimes: Sequence[str],
) -> Iterator[str]:
    any_ = next(iter(done.values()))
    rows = any_.table["models"]["personal"]["rows"]
    yield (
        f"Model `{Path(asked.model).name}`, LoRA of rank 8 on all linear layers, {asked.rounds} "
        f"rounds of 5 steps, learning rate {asked.rate:g}, seed {asked.seed}, "
        f"{len(any_.scores())} sites, n = {rows} test rows. Measured: {environment()}."
    )
    yield alike(cosines)
    if not asked.similarity:
        yield scored(done, regimes)


def _ratio(cosines: Mapping[str, Mapping[tuple[str, str], tuple[float, float]]]) -> float:
    change = {
        f: mean(p[1] for parts in cosines.values() for (_, g), p in parts.items() if g == f)
        for f in "AB"
    }
    return change["A"] / change["B"] if change["B"] else float("nan")


def _publish(name: str, text: str) -> None:
    first, last = (mark.format(name) for mark in MARKS)
    page = PAGE.read_text(encoding="utf-8")
    if first in page and last in page:
        head, rest = page.split(first, 1)
        page = f"{head}{first}\n\n{text}\n\n{last}{rest.split(last, 1)[1]}"
    else:
        page = f"{page.rstrip()}\n\n{first}\n\n{text}\n\n{last}\n"
    write_text(PAGE, page)


def _tell(event: tuple[str, dict[str, Any], float]) -> None:
    name, line, _ = event
    if line["evaluation"] and line["round"]:
        print(f"{name}: done", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--data", help="rows of your own, instead of the scenes")
    parser.add_argument("--by", help="column with the site of a row of --data")
    parser.add_argument("--model", default="tiny", help="model for --data")
    parser.add_argument("--rows", type=int, default=1300, help="rows of --data to use")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--rate", type=float, default=0.005, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--similarity", action="store_true", help="without the scores")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--output", default="runs/factors", help="folder of the runs")
    parser.add_argument("--publish", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--quick", action="store_true", help="a test of the script")
    return parser


if __name__ == "__main__":
    sys.exit(main())

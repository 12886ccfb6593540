"""Whether two source trees of fedvlm train the same adapters: every algorithm, every setting.

    python scripts/equality.py OLD_COMMIT --out TABLE.md
    python scripts/equality.py OLD_COMMIT --cases 'int8|topk' --engine both

One process for each tree runs all cases by ``fedvlm.run``: small federations of the bundled model,
in double precision, on one CPU thread. Both work at the same time. Then adapters, training losses
and bytes are compared. A case passes if no element of an adapter and no training loss differs by
more than 1e-6. Where ranks are factorized anew, the products B A have to agree: equal matrices have
many pairs of factors. Bytes are shown, and fail no case. Pictures are not written, to save time.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Settings = dict[str, Any]
Tree = dict[str, np.ndarray]

TOLERANCE = 1e-6
MOVED = 1e-3  # an element of some B has to be larger, or the case shows nothing
BASE: Settings = {
    "model": {"dtype": "float64", "device": "cpu"},
    "data": {"scenes": {"sites": 3, "rows": 12}, "val_fraction": 0.2, "test_fraction": 0.2},
    "partition": {"min_rows": 4},
    "lora": {"rank": 2, "alpha": 4},
    "train": {"rounds": 3, "local_steps": 2, "batch_size": 2},
    "eval": {"every": 0, "max_rows": 1, "max_new_tokens": 1},
    "engine": {"threads": 1},
}
ALGORITHMS = """
    auto plora lora fedsa ffa fedalora rolora iat share local fedprox scaffold mix ditto
    apfl fedex flora flexlora hetlora lorafair fedrot pair feddpa fedalt fedmosaic similar clustered
    fedlease fedtree centralized centralized+name
"""
OWN: dict[str, Settings] = {  # what an algorithm needs; no other is given it
    "share": {"algorithm": {"share": {"part:vision": "B", "layer:1-2": "AB"}}},
    "scaffold": {"train": {"optimizer": "sgd", "lr": 0.1}},
}
PRODUCTS = ("fedex", "flora", "flexlora")
OBJECTIVES: dict[str, Settings] = {  # besides sft, which all others have
    "dpo sigmoid": {"name": "dpo"},
    "dpo ipo": {"name": "dpo", "loss": "ipo"},
    "dpo smoothed": {"name": "dpo", "label_smoothing": 0.2},
}
WIRES: dict[str, Settings] = {
    "bf16": {"compress": "bf16"},
    "int8": {"compress": "int8"},
    "topk": {"compress": "topk", "topk": 0.2},
}
OTHERS: dict[str, Settings] = {
    "one local epoch": {"train": {"local_steps": None, "local_epochs": 1}},
    "dropout": {"lora": {"dropout": 0.2}},
    "passes of two clients": {"train": {"clients_per_round": None}, "engine": {"clients": 2}},
    "sorted by length": {"train": {"sort_by_length": True}},
    "micro-batches": {"train": {"batch_size": 3}, "engine": {"micro_batch": 2}},
}


class Case(NamedTuple):
    """A run that both trees do: its name, its settings, and why it may differ, if it may."""

    name: str
    settings: Settings
    expected: str = ""


def merged(*trees: Settings) -> Settings:
    """Settings, section by section; the later ones win."""
    both: Settings = {}
    for tree in trees:
        for key, value in tree.items():
            inside = isinstance(both.get(key), dict)
            both[key] = merged(both[key], value) if inside else value
    return both


def all_cases(engine: str) -> Iterator[Case]:
    """Every case, trained by one engine."""

    def case(text: str, name: str, *more: Settings, few: int | None = 2, why: str = "") -> Case:
        sampled = {"train": {"clients_per_round": few}, "engine": {"name": engine}}
        tree = merged(BASE, {"algorithm": {"name": name}}, OWN.get(name, {}), sampled, *more)
        return Case(text.format(name), tree, why)

    for name in ALGORITHMS.split():
        yield case("{}", name, few=None)
        yield case("{}, 2 of 3 clients", name)
    yield case("{}, 1 of 3 clients", "auto", few=1)  # which begins at what it is sent
    yield case("{}, 5 rounds", "auto", {"train": {"rounds": 5}}, few=None)  # and chooses again
    for name in ("plora", "lora", "auto", "flexlora", "hetlora", "scaffold", "ditto"):
        yield case("unequal ranks, {}", name, {"lora": {"ranks": {"site-0": 1}}})
    optimizers = [(server, "lora") for server in ("avgm", "adam", "yogi", "adagrad")]
    for server, name in (*optimizers, ("adam", "rolora")):
        yield case(f"server {server}, {{}}", name, {"algorithm": {"server": {"name": server}}})
    for name in ("plora", "rolora"):
        yield case("proximal term, {}", name, {"algorithm": {"prox_mu": 0.5}})
    for text, section in OBJECTIVES.items():
        for name in ("plora", "auto", "lora"):
            yield case(f"{text}, {{}}", name, {"objective": section})
    for text, section in WIRES.items():
        names = ["lora", "plora", "rolora", "scaffold", "ditto", "hetlora"]
        names += {"bf16": ["auto"], "int8": ["auto", "flexlora"], "topk": []}[text]
        for name in names:  # auto and flexlora refuse topk
            leak = "the old auto was shown the rest that int8 keeps, under names unsent/..."
            why = leak if (text, name) == ("int8", "auto") else ""
            yield case(f"{text}, {{}}", name, {"wire": section}, why=why)
    for text, section in OTHERS.items():
        for name in ("plora", "auto"):
            yield case(f"{text}, {{}}", name, section)


def work(folder: Path) -> None:
    """The process of a tree: runs the cases in its folder, one after another."""
    import matplotlib.figure

    import fedvlm

    source = Path(os.environ["PYTHONPATH"]).resolve()
    if not Path(fedvlm.__file__).resolve().is_relative_to(source):
        sys.exit(f"fedvlm was imported from {fedvlm.__file__}, not from {source}")
    matplotlib.figure.Figure.savefig = lambda figure, path, **_: Path(path).touch()  # type: ignore
    cases = [Case(*each) for each in json.loads((folder / "cases.json").read_text())]
    for number, case in enumerate(cases):
        began, error = time.perf_counter(), ""
        try:
            fedvlm.run(case.settings, f"output={folder / str(number)}")
        except Exception as raised:
            first, *more = str(raised).replace(str(folder), "").splitlines() or [""]
            first += more[0].replace("  - ", " ") if first.endswith(":") and more else ""
            error = f"{type(raised).__name__}: {first}"
        (folder / f"{number}.txt").write_text(error)
        shown = f"{folder.name} {number + 1:>3}/{len(cases)} {time.perf_counter() - began:5.1f} s"
        print(f"{shown}  {case.name}  {error}".rstrip(), flush=True)


def start(python: str, tree: Path, folder: Path, cases: list[Case]) -> subprocess.Popen[bytes]:
    """Starts the process of a tree, with caches of its own."""
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    own = {"PYTHONPATH": str(tree / "src"), "FEDVLM_CACHE": str(folder / "cache")}
    own |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    own |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [python, "-P", str(Path(__file__).resolve()), "--worker", str(folder)]
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, stderr=log, env={**os.environ, **own})


def extracted(commit: str, checkout: Path, folder: Path) -> Path:
    """The tree of a commit, without a work tree that git would remember; or a folder as it is."""
    if (Path(commit) / "src" / "fedvlm").is_dir():
        return Path(commit).resolve()
    command = ["git", "-C", str(checkout), "archive", commit, "src"]
    packed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def row(case: Case, old: Path, new: Path) -> list[str]:
    """A line of the table: what came out of a case, in the folders of its two runs."""
    name, engine = case.settings["algorithm"]["name"], case.settings["engine"]["name"]
    try:
        cells, same = compared(old, new, products=name in PRODUCTS)
    except (ValueError, KeyError, OSError) as problem:
        return [case.name, engine, *"-----", f"FAIL: {problem}".replace("|", "/")]
    verdict = "pass" if same else f"expected: {case.expected}" if case.expected else "FAIL"
    return [case.name, engine, *cells, verdict]


def compared(old: Path, new: Path, products: bool) -> tuple[list[str], bool]:
    """Cells of the table, and whether two runs are the same; ValueError if that cannot be said."""
    notes = {run.parent.name: run.with_suffix(".txt") for run in (old, new)}
    ends = {n: f.read_text() if f.exists() else "its process ended" for n, f in notes.items()}
    if any(ends.values()):
        raise ValueError("; ".join(f"{n}: {text}" for n, text in ends.items() if text))
    (ours, losses, lines), (theirs, others, rest) = read(old), read(new)
    if not any(np.abs(t).max() > MOVED for n, t in ours.items() if ".lora_B." in n):
        raise ValueError("nothing was trained")
    largest = furthest(ours, theirs)
    exact = all(t.tobytes() == theirs[n].tobytes() for n, t in ours.items())
    if products:
        largest = furthest(multiplied(ours), multiplied(theirs))
    loss, adapters = furthest(losses, others), len({n.partition("/")[0] for n in ours})
    found = "bit for bit" if exact else f"{largest:.1e}{' (B A)' if products else ''}"
    counts = [sent(lines, rest, way) for way in ("bytes_up", "bytes_down")]
    cells = [str(adapters), found, f"{loss:.1e}" if loss else "0", *counts]
    return cells, largest <= TOLERANCE and loss <= TOLERANCE


def read(run: Path) -> tuple[Tree, Tree, list[Settings]]:
    """The adapters that a run exported, global and clients', its losses, its lines of metrics."""
    from safetensors.numpy import load_file

    paths = sorted((run / "adapters").glob("*/adapter_model.safetensors"))
    tree = {f"{path.parent.name}/{n}": t for path in paths for n, t in load_file(path).items()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [
        (line["round"], *item) for line in lines for item in line.get("train_loss", {}).items()
    ]
    return tree, {f"loss of {c} in round {n}": np.array(loss) for n, c, loss in losses}, lines


def furthest(ours: Tree, theirs: Tree) -> float:
    """The largest difference of an element; a NaN if there is one."""
    if odd := ours.keys() ^ theirs.keys():
        raise ValueError(f"{len(odd)} are in one tree only, such as {min(odd)}")
    if odd := {n for n, t in ours.items() if t.shape != theirs[n].shape}:
        raise ValueError(f"{len(odd)} have another shape, such as {min(odd)}")
    return float(np.max([np.abs(t - theirs[n]).max() for n, t in ours.items()]))


def multiplied(tree: Tree) -> Tree:
    """A's name -> B A."""
    pairs = {n: n.replace(".lora_A.", ".lora_B.") for n in tree if ".lora_A." in n}
    return {a: tree[b] @ tree[a] for a, b in pairs.items()}


def sent(lines: list[Settings], others: list[Settings], way: str) -> str:
    """A run's bytes, of the old tree and, where any message has others, of the new one."""
    old, new = ([line.get(way, {}) for line in each] for each in (lines, others))
    totals = [f"{sum(sum(each.values()) for each in run):,}" for run in (old, new)]
    return totals[0] if old == new else " -> ".join(totals)


def table(rows: list[list[str]]) -> str:
    """As Markdown, and a last line with the counts."""
    head = ["case", "engine", "adapters", "largest difference", "of losses"]
    head += ["bytes up", "bytes down", "verdict"]
    passed = [cells for cells in rows if cells[-1] == "pass"]
    exact = sum(cells[3] == "bit for bit" for cells in passed)
    failed = sum(cells[-1].startswith("FAIL") for cells in rows)
    counts = (
        f"{len(rows)} cases: {exact} bit for bit, {len(passed) - exact} within {TOLERANCE:g}, "
        f"{len(rows) - len(passed) - failed} with an expected difference, {failed} failed; "
        f"other bytes in {sum('->' in cells[5] + cells[6] for cells in rows)}"
    )
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{counts}\n"


def main() -> int:
    """Runs the cases in both trees; 1 if one fails."""
    here, engines = Path(__file__).resolve().parents[1], ["cohort", "reference"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("old", help="a commit, or a folder with src/fedvlm in it")
    add("--new", type=Path, default=here, help="folder of the other tree; empty: this checkout")
    add("--cases", default="", help="a regular expression to find in their names")
    add("--engine", choices=[*engines, "both"], default="cohort")
    add("--out", type=Path, help="a file for the table")
    add("--keep", type=Path, help="a new folder for the runs; empty: they go")
    add("--python", default=sys.executable)
    args = parser.parse_args()
    chosen = engines if args.engine == "both" else [args.engine]
    cases = [c for engine in chosen for c in all_cases(engine) if re.search(args.cases, c.name)]
    if not cases:
        parser.error(f"--cases: no name has '{args.cases}'")
    with tempfile.TemporaryDirectory(prefix="equality-") as temporary:
        folder = (args.keep or Path(temporary) / "runs").resolve()
        trees = {"old": extracted(args.old, args.new, Path(temporary)), "new": args.new.resolve()}
        workers = {n: start(args.python, t, folder / n, cases) for n, t in trees.items()}
        for name, worker in workers.items():
            if status := worker.wait():
                log = (folder / name / "log.txt").read_text(errors="replace")
                print(f"{name}: its process ended with {status}\n{log[-2000:]}", file=sys.stderr)
        runs = [(folder / "old" / str(n), folder / "new" / str(n)) for n in range(len(cases))]
        rows = [row(case, *run) for case, run in zip(cases, runs, strict=True)]
    text = table(rows)
    print(text, end="")
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return int(any(cells[-1].startswith("FAIL") for cells in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]))
    else:
        sys.exit(main())

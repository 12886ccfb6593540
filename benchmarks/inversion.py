"""Inversion: what a curious server reconstructs from one upload, with and without protection.

The server follows the protocol. It has the base model, its own download, the settings of the run,
and the upload of a site with a few training rows. It tries three attacks:

- tokens: which tokens of the vocabulary fit the change of the first and of the last layer;
- lineup: which of a hundred candidates is the site's row, picture or text;
- search, features: pixels, or image features, whose gradient matches the change.

Each attack meets uploads without protection, after compression, after clipping of each row's
gradient, and with the noise of epsilon 8 and 3. docs/inversion.md has the results and the reading.

    python benchmarks/inversion.py [--parts tokens,lineup] [--publish] [--quick]
    python benchmarks/inversion.py --parts lineup,search --data photos.parquet
    python benchmarks/inversion.py --parts tokens --model runs/smol --data vqarad.parquet

The noise needs `pip install 'fedvlm[privacy]'`; without it, its lines are left out. With
`--publish` each part replaces its section of docs/inversion.md and its pictures. The last line is
`RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from _common import ROOT, environment
from _inversion import cases, figures, parts
from _inversion.lab import Lab
from _inversion.parts import Part
from _inversion.uploads import Source
from fedvlm.store.files import write_text

PAGE, IMAGES = ROOT / "docs" / "inversion.md", ROOT / "docs" / "images"
MARKS = "<!-- written by benchmarks/inversion.py: {} -->", "<!-- end of {} -->"
PARTS: dict[str, Callable[..., Part]] = {
    "tokens": parts.tokens,
    "lineup": parts.lineup,
    "features": parts.features,
    "search": parts.search,
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs the chosen parts, and prints their tables."""
    words = sys.argv[1:] if words is None else list(words)
    asked = argparse.Namespace(**vars(_parser().parse_args(words)), words=words)
    torch.set_num_threads(1)
    noise = cases.noises()
    if not noise:
        print("no accountant (pip install 'fedvlm[privacy]'): the cases with noise are left out")
    elif asked.quick:
        noise = dict(list(noise.items())[:1])
    lab = Lab(_source(asked))
    print(environment())
    done: dict[str, Part] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = IMAGES if asked.publish else Path(scratch if asked.quick else asked.output)
        for name in asked.parts.split(","):
            began = time.process_time()
            done[name] = PARTS[name](lab, noise, asked.quick)
            seconds = time.process_time() - began
            key = f"{name}, {_named(asked)}"
            drawn = _draw(done[name], name, _named(asked), folder)
            text = "\n\n".join([_measured(asked, noise, seconds), *done[name].tables])
            print(f"\n{key}\n\n{text}\n" + "".join(f"{path}\n" for path in drawn), flush=True)
            if asked.publish:
                _publish(key, text)
    print(_ratio(done))
    return 0


def _source(asked: argparse.Namespace) -> Source:
    if asked.quick:
        return Source(asked.model, asked.data, rows=4, others=30, seed=asked.seed)
    if asked.model != "tiny":
        return Source(asked.model, asked.data, rows=4, others=200, seed=asked.seed)
    return Source(asked.model, asked.data, seed=asked.seed)


def _named(asked: argparse.Namespace) -> str:
    """The model and the rows, such as ``tiny on scenes``."""
    return f"{Path(asked.model).name} on {Path(asked.data).stem if asked.data else 'scenes'}"


def _measured(asked: argparse.Namespace, noise: cases.Noises, seconds: float) -> str:
    """The line above a table: settings, date, commit and command."""
    words = [Path(word).name if word == asked.data else word for word in asked.words]
    command = shlex.join(["python", "benchmarks/inversion.py", *words])
    loud = ", ".join(f"{n:.3f} for epsilon {e:g}" for e, n in noise.items())
    return (
        f"LoRA on all linear layers, seed {asked.seed}. Noise over the clipping norm: {loud} (site "
        f"of {cases.ROWS} rows, {cases.BATCH} rows expected in a step, {cases.STEPS} steps, delta "
        f"{cases.DELTA:g}). Measured: {environment()}, {seconds:.0f} s of CPU, `{command}`."
    )


def _draw(part: Part, name: str, source: str, folder: Path) -> list[Path]:
    """Saves the figures of a part; returns their paths."""
    data = source.split(" on ")[1]
    if part.grid:
        count = len(part.labels)
        columns = {n: shown for n, shown in part.grid.items() if len(shown) == count}
        title = "What the server recovers from one upload"
        return [figures.grid(columns, part.labels, folder / f"inversion-{data}.png", title)]
    if name == "lineup":
        title = "Site's picture picked first out of 100"
        return [figures.bars(part.numbers, 0.01, folder / f"inversion-lineup-{data}.png", title)]
    return []


def _publish(key: str, text: str) -> None:
    """Replaces a section of the page, or adds it at the end."""
    first, last = (mark.format(key) for mark in MARKS)
    page = PAGE.read_text(encoding="utf-8")
    if first in page and last in page:
        head, rest = page.split(first, 1)
        page = f"{head}{first}\n\n{text}\n\n{last}{rest.split(last, 1)[1]}"
    else:
        page = f"{page.rstrip()}\n\n{first}\n\n{text}\n\n{last}\n"
    write_text(PAGE, page)


def _ratio(done: dict[str, Part]) -> str:
    """The last line: the headline number of the first part that has one."""
    if "lineup" in done and "none" in done["lineup"].numbers:
        share = done["lineup"].numbers["none"]
        return (
            f"RATIO {share / 0.01:.1f} pictures picked out of 100 without protection, over a guess"
        )
    name, part = next(iter(done.items()))
    return f"RATIO {next(iter(part.numbers.values())):.3f} {name}, {next(iter(part.numbers))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: %(default)s")
    parser.add_argument("--model", default="tiny", help="tiny, or the folder of an Idefics3 model")
    parser.add_argument("--data", help="a file of rows, instead of the scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/inversion", help="folder of the pictures")
    parser.add_argument("--publish", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--quick", action="store_true", help="a test of the script")
    return parser


if __name__ == "__main__":
    sys.exit(main())

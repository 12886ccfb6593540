"""Personalization: all algorithms on equal terms, where sites are alike and where they differ.

A cell is a regime (the kind of difference between sites), a strength, and a number of training rows
a client. In a cell all algorithms get the same rows, partitions, cohorts, batches and initial
weights, the same number of optimizer steps and the same ending, with five seeds. Validation chooses
the learning rate of each algorithm, from three rates with one seed, once for each kind of regime:
sites that are alike, sites that differ, photographs. Differences have 95 % intervals by a paired
bootstrap over (seed, client). The output folder keeps finished runs. The next start skips them,
also after kill -9 or with other filters.

    python benchmarks/personalization.py            # 8 cells, 6 algorithms, 5 seeds
    python benchmarks/personalization.py --small    # a part of them, with the same settings
    python benchmarks/personalization.py --all      # every cell, every algorithm
    python benchmarks/personalization.py --cells mixed-1-80 --algorithms lora,plora --seeds 0,1
    python benchmarks/personalization.py --dry-run  # print the remaining work and its time
    python benchmarks/personalization.py --add --publish  # run and publish unpublished results only

A real cell is any data and any model of yours. It takes 8 rounds of 5 steps, a form for two CPU
cores. Of several rates, validation rows choose one for each algorithm:

    python benchmarks/personalization.py --data F.parquet --by site6 --model M --rate 0.001,0.002

The script writes personalization.csv, personalization.md and two figures to the output folder. With
`--publish` it writes them to benchmarks/results and docs/personalization.md, and all measurements
to personalization.jsonl. With `--add` it counts the measurements in that file as done. The last
line is `RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _common import ROOT
from _personalization import (
    cells,
    figures,
    pages,
    real,
    record,
    scores,
    taken,
    targets,
)
from _personalization import plan as plans
from _personalization.runs import Job, do, read
from fedvlm.errors import FedVLMError
from fedvlm.metrics import mean
from fedvlm.store import run as stores
from fedvlm.store.files import write_text

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "personalization.md"
MARKS = "<!-- written by benchmarks/personalization.py -->", "<!-- end of what is written -->"


def main(words: Sequence[str] | None = None) -> int:
    """Runs the requested part of the benchmark, and writes all results of the output folder."""
    asked = _parser().parse_args(words)
    output = Path(asked.output)
    if own := real.asked(asked):
        return _real(own, output, asked)
    if asked.take:
        new = sum(taken.take(Path(folder), output) for folder in asked.take)
        print(f"{new} runs are new in {output}")
        _write(plans.whole(), output, asked.publish)
        return 0
    if asked.quick:
        with tempfile.TemporaryDirectory() as folder:
            asked.publish = False
            return _benchmark(plans.quick(), plans.quick(), Path(folder), asked)
    form = plans.small() if asked.small else plans.whole() if asked.all else plans.main()
    form = filtered(form, asked)
    form = without_photos(form)
    return _benchmark(form, plans.whole(), output, asked)


def _real(own: real.Real, output: Path, asked: argparse.Namespace) -> int:
    """Runs a real cell, and writes all results of the output folder."""
    odd = ("cells", "small", "all", "quick", "take")
    size = [f"--{name}" for name in odd if getattr(asked, name)]
    if size:
        raise FedVLMError(f"{', '.join(size)}: no meaning for the cell of --data")
    if asked.add:
        _add(output)
    real.keep(own, output, dry=asked.dry_run)
    form = filtered(plans.Form((), cells.MAIN["algorithms"], real.SEEDS), asked)
    failed = _told(own, real.tuning(own, form.algorithms, output), asked)
    if not asked.dry_run:
        real.choose(own, form.algorithms, output)
    failed += _told(own, real.jobs(own, form.algorithms, form.seeds, output), asked)
    if not asked.dry_run:
        _write(plans.whole(), output, asked.publish)
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


def _told(own: real.Real, jobs: list[Job], asked: argparse.Namespace) -> list[str]:
    """Prints how long the missing jobs of a real cell take, and runs them; the failed ones."""
    if not jobs:
        return []
    found = [(job, read(job)) for job in jobs]
    taken = [(job, record["seconds"]) for job, record in found if record and record["seconds"]]
    todo = [job for job, record in found if record is None]
    minutes = plans.seconds(todo, taken, real.SECONDS_A_STEP) / 60 / asked.jobs
    print(
        f"{own.cell.name}: {len(todo)} runs to do, {len(jobs) - len(todo)} done"
        f"{', to choose learning rates' if jobs[0].tunes else ''}; about "
        f"{minutes:.0f} minutes with {asked.jobs} at a time, by "
        f"{f'{len(taken)} runs measured here' if taken else 'a guess'}",
        flush=True,
    )
    return [] if asked.dry_run or asked.tables else do(todo, asked.jobs, _tell)


def _add(output: Path) -> None:
    print(f"{record.unpack(RESULTS / record.NAME, output)} published runs count as done")


def _benchmark(form: plans.Form, whole: plans.Form, output: Path, asked: argparse.Namespace) -> int:
    try:
        if asked.add:
            _add(output)
        _announce(form, whole, output, asked.jobs)
        failed: list[str] = []
        if not (asked.dry_run or asked.tables):
            print("learning rates, on validation rows", flush=True)
            failed = do(plans.tuning(form, output), asked.jobs, _tell)
            print("the runs that are compared", flush=True)
            rates = plans.chosen(form, output)
            if form.rate is None:
                record.keep_rates(output, record.read_rates(output) | rates)
            jobs = list(plans.runs(form, rates, output))
            for seed in form.seeds:
                failed += do([j for j in jobs if j.seed == seed], asked.jobs, _tell)
    finally:
        if not asked.dry_run:
            _write(whole, output, asked.publish)
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="two cells, four algorithms, two seeds")
    size.add_argument("--all", action="store_true", help="every cell and every algorithm")
    size.add_argument("--quick", action="store_true", help="a test of the script; keeps no results")
    parser.add_argument(
        "--cells", type=_names, help="names such as iid-0-80,mixed-1-24, or regimes"
    )
    parser.add_argument("--algorithms", type=_names, help="names such as local,lora,plora")
    parser.add_argument("--seeds", type=_names, help="numbers such as 0,1")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="number of parallel runs"
    )
    parser.add_argument("--output", default="runs/personalization", help="folder of the runs")
    parser.add_argument("--dry-run", action="store_true", help="print the estimate only")
    parser.add_argument(
        "--tables", action="store_true", help="run nothing; write the measured results"
    )
    parser.add_argument("--add", action="store_true", help="count published results as done")
    parser.add_argument(
        "--publish", action="store_true", help="write the results into this repository"
    )
    real.options(parser)
    return parser


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def filtered(form: plans.Form, asked: argparse.Namespace) -> plans.Form:
    """A form with the requested cells, algorithms and seeds. Cells may come from the whole form.

    Raises:
        FedVLMError: a name is unknown.
    """
    if asked.cells:
        known = cells.full()
        odd = [n for n in asked.cells if not any(n in (c.name, c.regime) for c in known)]
        _refuse("--cells", odd, [cell.name for cell in known])
        some = tuple(c for c in known if {c.name, c.regime} & set(asked.cells))
        form = dataclasses.replace(form, cells=some)
    if asked.algorithms:
        _refuse("--algorithms", set(asked.algorithms) - set(cells.ALGORITHMS), cells.ALGORITHMS)
        form = dataclasses.replace(form, algorithms=tuple(asked.algorithms))
    if asked.seeds:
        odd = [seed for seed in asked.seeds if not seed.isdigit()]
        _refuse("--seeds", odd, ["whole numbers from 0"])
        form = dataclasses.replace(form, seeds=tuple(map(int, asked.seeds)))
    return form


def _refuse(option: str, odd: Any, known: Any) -> None:
    if odd:
        raise FedVLMError(
            f"{option}: unknown {', '.join(sorted(odd))}; there are {', '.join(known)}"
        )


def without_photos(form: plans.Form) -> plans.Form:
    """Leaves out the photographs where their file is missing, and prints a line about it."""
    if cells.PHOTOS.exists() or not any(cell.regime == "photos" for cell in form.cells):
        return form
    print(f"SKIPPED photos: there is no {cells.PHOTOS}")
    some = tuple(cell for cell in form.cells if cell.regime != "photos")
    return dataclasses.replace(form, cells=some)


def _announce(form: plans.Form, whole: plans.Form, output: Path, jobs: int) -> None:
    done, todo = split(form, output)
    taken = [(job, found["seconds"]) for job, found in done if found["seconds"] and not job.joins]
    basis = f"{len(taken)} runs measured here" if taken else "no run measured here yet"
    print(f"{len(todo)} pieces to do, {len(done)} done; {_time(todo, taken, jobs)}; by {basis}")
    rates = plans.number_of_runs(whole)
    entire = [*plans.tuning(whole, output), *plans.runs(whole, _any_rates(whole), output)]
    print(
        f"all that there is: {rates[0]} runs for learning rates and {rates[1]} compared; "
        f"{_time(entire, taken, jobs)}",
        flush=True,
    )


def _time(todo: Sequence[Job], taken: Sequence[tuple[Job, float]], jobs: int) -> str:
    trained = {j.folder: j for j in todo if not j.joins or not stores.is_run(j.folder)}
    minutes = plans.seconds(trained.values(), taken) / 60 / jobs
    joins = sum(job.joins for job in todo)
    time = f"{minutes / 60:.1f} hours" if minutes > 120 else f"{minutes:.0f} minutes"
    also = f", and {joins} times clients that join" if joins else ""
    return f"about {time} with {jobs} at a time{also}"


def _any_rates(form: plans.Form) -> dict[tuple[str, str], float]:
    return {(cells.kind(c), a): cells.rates(a)[0] for c in form.cells for a in form.algorithms}


def split(form: plans.Form, output: Path) -> tuple[list[tuple[Job, dict[str, Any]]], list[Job]]:
    """The finished jobs of a form with their measurements, and the remaining jobs.

    A job whose learning rate is not chosen yet has the first candidate rate.
    """
    rates = _any_rates(form) | plans.chosen(form, output)
    jobs = [*plans.tuning(form, output), *plans.runs(form, rates, output)]
    found = [(job, read(job)) for job in jobs]
    return [(j, r) for j, r in found if r is not None], [j for j, r in found if r is None]


def _tell(event: tuple[str, dict[str, Any], float]) -> None:
    name, line, seconds = event
    if line["evaluation"] and line["round"]:
        found = [s["exact_match"] for s in line["evaluation"]["personal"].values()]
        print(f"{name}: round {line['round']}, {mean(found):.3f}, {seconds:.1f} s", flush=True)


def _write(whole: plans.Form, output: Path, publish: bool) -> None:
    """Writes the raw results, the tables and the figures of all measurements in a folder."""
    done, todo = split(whole, output)
    own = real.rows(output)
    rows = [*plans.rows(job for job, _ in done if not job.tunes), *own]
    if not rows:
        print("nothing is measured yet")
        return
    results = RESULTS if publish else output
    write_text(results / "personalization.csv", as_csv(rows))
    rates = plans.chosen(whole, output)
    before = sum(len(cells.rates(name)) for _, name in record.read_rates(output))
    state = stated(done, todo, before) if done else "No scenes and no photographs yet."
    if own:
        runs = {(r["regime"], r["rows_per_client"], r["algorithm"], r["seed"]) for r in own}
        state += f" Beside these, {len(runs)} runs in cells of other data."
    images = PAGE.parent / "images" if publish else output
    part = ", a part of all that there is" if todo else ""
    figures.draw(scores.main(rows), images, f"Personalization{part}: {pages.seeds(rows)}")
    text = written(rows, state, rates, "images" if publish else ".", real.stated(output))
    write_text(
        results / "personalization.md", f"# Personalization\n\n{state}\n\n{pages.details(rows)}\n"
    )
    if publish:
        record.pack(output, RESULTS / record.NAME)
        write_text(PAGE, placed(PAGE.read_text(encoding="utf-8"), text))
    print(f"\n{text}\n\nwritten to {results}\n\n{targets.ratio(rows)}", flush=True)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The raw results as CSV. A field without a number is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, plans.COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return out.getvalue()


def stated(done: Sequence[tuple[Job, dict[str, Any]]], todo: Sequence[Job], before: int = 0) -> str:
    """A paragraph about the finished and the missing results.

    Args:
        done: finished jobs and their measurements.
        todo: missing jobs.
        before: number of runs for learning rates chosen earlier.
    """
    compared = [(job, found) for job, found in done if not job.tunes]
    tuned = len(done) - len(compared) + before
    missing = [job for job in todo if not job.tunes]
    total = len(compared) + len(missing)
    found = [f for _, f in done]
    seconds = [f["seconds"] for _, f in compared if f["seconds"]]
    took = f"; a compared run took {mean(seconds):.0f} s on average" if seconds else ""
    whole = "All that there is" if not todo else "**A part of all that there is**"
    return (
        f"{whole}: {len(compared)} of {total} results, {tuned} runs for learning rates. "
        f"Measured on {_list(f['date'] for f in found)}, commit {_list(f['commit'] for f in found)}"
        f"{took}. Cells: {_list(j.cell.name for j, _ in compared)}. "
        f"Algorithms: {_list(j.algorithm for j, _ in compared)}. "
        f"Seeds: {_list(str(j.seed) for j, _ in compared)}."
    )


def _list(words: Any) -> str:
    return ", ".join(dict.fromkeys(words))


def written(
    rows: Sequence[dict[str, Any]], state: str, rates: Any, images: str, own: str = ""
) -> str:
    """The generated part of the page.

    Args:
        rows: the raw results.
        state: a paragraph about finished and missing results.
        rates: the chosen learning rates.
        images: folder of the figures.
        own: sentences about the cells of the user's data.
    """
    some = scores.main(rows)
    found = {"Overview": scores.parts(some)[0], "Real cells": scores.parts(some)[1]}
    shown = [
        f"## {title}\n\n{pages.overview(part)}\n\n{pages.matrix(part)}"
        + (f"\n\n{_by_site(part, own)}" if title == "Real cells" and own else "")
        for title, part in found.items()
        if part
    ]
    return "\n\n".join(
        [
            state,
            pages.READING,
            f"![Algorithms by cells]({images}/personalization-overview.png)",
            *shown,
            f"## What `{scores.DEFAULT}` was to reach",
            targets.targets(some),
            "## What pays",
            pages.PAYS,
            pages.pays(some),
            "## All algorithms",
            pages.everyone(rows),
            f"![A panel a cell]({images}/personalization-cells.png)",
            "## Learning rates",
            pages.rates(rates),
        ]
    )


def _by_site(rows: Sequence[dict[str, Any]], own: str) -> str:
    some = dict.fromkeys(scores.place(r) for r in rows if r["metric"] == real.METRIC)
    return f"{own}\n\n{pages.by_site(rows, some)}"


def placed(page: str, text: str) -> str:
    """The page with new text between its marks."""
    first, last = MARKS
    between = re.compile(re.escape(first) + ".*?" + re.escape(last), re.DOTALL)
    if not between.search(page):
        raise FedVLMError(f"'{PAGE}' has no line '{first}' with '{last}' below it: restore them")
    return between.sub(lambda _: f"{first}\n\n{text}\n\n{last}", page)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FedVLMError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

"""Start-up: CPU time of short commands and of a run's first step, beside another commit.

Each command is a new process with one thread. A run has an empty cache and ends by an exception
after its first training, so it loads, encodes and scores. Both sides take turns.

    python benchmarks/startup.py OTHER [--quick] [--repeats 3] [--data FILE [--set KEY=VALUE ...]]

OTHER is a checkout of another commit; without it, this checkout is beside itself. FILE is
vqarad.parquet; clients are the values of its column `site`, and `--set` adds settings to the plan
and the run on it. The last line is `RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import ROOT, environment, paired, ratio

COMMANDS = {
    "--help": "run --help",
    "--print-config": "run --print-config",
    "wrong setting": "run train.roundz=3",
    "no such run": "report no-such-run",
    "--dry-run": "run --dry-run",
}
STEP = """
import sys, fedvlm
class First(fedvlm.Callback):
    def trained(self, client, loss):
        sys.exit()
fedvlm.run({"output": "run"}, *sys.argv[1:], callbacks=[First()])
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", nargs="?", type=Path, default=ROOT, help="checkout of a commit")
    parser.add_argument("--quick", action="store_true", help="one turn of two short commands")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="parquet file with the columns of vqarad.parquet")
    parser.add_argument("--set", nargs="+", default=[], help="more settings of runs on --data")
    options = parser.parse_args()
    print(environment())
    work = {name: ["-m", "fedvlm", *words.split()] for name, words in COMMANDS.items()}
    if options.quick:
        work = dict(list(work.items())[:2])
    else:
        work["first step"] = ["-c", STEP]
    if options.data:
        real = [f"data.path={options.data.resolve()}", "partition.column=site", *options.set]
        work["--dry-run, data"] = ["-m", "fedvlm", "run", "--dry-run", *real]
        work["first step, data"] = ["-c", STEP, *real]
    last = 0.0
    for name, words in work.items():
        sides = {
            "there": lambda words=words: cpu_seconds(options.other, words),
            "here": lambda words=words: cpu_seconds(ROOT, words),
        }
        times = paired(sides, 1 if options.quick else options.repeats)
        last, low, high = ratio(times["here"], times["there"])
        there, here = (statistics.median(times[side]) for side in ("there", "here"))
        print(
            f"{name:<18} {there:6.2f} s there {here:6.2f} s here  {last:.2f} ({low:.2f}-{high:.2f})"
        )
    print(f"RATIO {last:.2f} CPU time of {name!r}, here / there")


def cpu_seconds(checkout: Path, words: list[str]) -> float:
    """CPU seconds of a Python process that imports fedvlm from a checkout, with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "PYTHONPATH": str(checkout.resolve() / "src"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "FEDVLM_CACHE": f"{folder}/cache",
            "HF_DATASETS_CACHE": f"{folder}/datasets",
        }
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env={**os.environ, **settings},
            capture_output=True, text=True,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if "Traceback" in done.stderr:
        raise RuntimeError(done.stderr)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()

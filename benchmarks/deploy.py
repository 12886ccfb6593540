"""The overhead of a deployed round, beside Flower's deployment runtime.

    python benchmarks/deploy.py [--quick] [--secure] [--sites 3,10] [--megabytes 1,16] [--venv DIR]

The script starts real processes on this machine, over loopback, with TLS. For fedvlm these are
`fedvlm deploy server`, a `fedvlm site start` for every site, and a run. For Flower they are
`flower-superlink`, a `flower-supernode` for every client, and `flwr run`. On both sides server and
clients share the cores of this machine, so they slow each other down.

- fedvlm: `lora`, whose factors travel down and up, with one step of batch 1. The rank sets the size
  of an upload. 1 MB uses the bundled model. 16 MB uses a model of twice the width with random
  weights.
- flower: FedAvg on arrays of the same shapes. The client uses numpy only and returns its download
  plus a small number. It has no model, nothing to compute and nothing to save. Only the server has
  a certificate; with fedvlm every site has one as well.

The overhead of a round is its wall time, from the end of the round before to its end, minus the
slowest client's own seconds. It includes the messages down and up, TLS, waiting for other processes
and for a core, the checks on messages, the fold, and the server's checkpoint. With fedvlm, a
client's own seconds last from the tensors of its download to the tensors of its upload. They
include writing its state to the disk, which Flower's client does not do. The column `saves s` shows
that part: the median of the last two rounds of all sites. Add it to the overhead for the overhead
with saving. With Flower, a client's own seconds are those of the ClientApp's function, conversion
of arrays included. The first round does not count. With fedvlm the last round, in which the sites
evaluate, does not count either.

Memory is the peak resident memory (VmHWM) of the process with the round loop (`job`) and of its
parent (`server`). For a client it is the peak of the memory allocated by all its processes, as a
mean over all clients.

With `--secure`, fedvlm also runs with secure aggregation (`wire.secure`), whose sites pin one
another's keys. A line gives its overhead and its bytes over those without.

Flower is installed as for `peers.py`. NVFlare comes with `pip install 'fedvlm[deploy]'`. The last
line is `RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import _deploy.flower
import _deploy.ours
from _common import environment
from _deploy.watch import Outcome, limited
from peers import QUIET, VENV, install

LIMIT = 900  # seconds of one side of one case
HEAD = ("side", "sites", "MB up", "overhead s", "range", "round s", "own s", "saves s")
MEMORY = ("server job MB", "server MB", "a client MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 sites, 0.07 MB, 1 round")
    parser.add_argument("--sites", default="3,10", help="numbers of sites (default: %(default)s)")
    parser.add_argument(
        "--megabytes", default="1,16", help="size of an upload (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds after the first")
    parser.add_argument(
        "--at-once", type=int, default=16, help="calls in parallel of fedvlm's server"
    )
    parser.add_argument(
        "--secure", action="store_true", help="measure fedvlm with secure aggregation as well"
    )
    parser.add_argument("--only", choices=("fedvlm", "flower"), help="measure one side only")
    parser.add_argument("--venv", type=Path, default=VENV, help="Flower's environment")
    options = parser.parse_args()
    if find_spec("nvflare") is None:
        print("nothing measured: NVFlare is missing, see pip install 'fedvlm[deploy]'")
        return
    if options.quick:
        options.sites, options.megabytes, options.repeats = "2", "0.07", 1
    flower = options.only != "fedvlm"
    if options.quick:
        flower = flower and (options.venv / "bin" / "flower-superlink").exists()
    elif flower:
        install(options.venv)
    print(environment())
    print(f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print(f"| {' | '.join((*HEAD, *MEMORY))} |")
    print("| " + " | ".join("---" for _ in (*HEAD, *MEMORY)) + " |", flush=True)
    ratios = [
        compare(sites, size, options, flower)
        for size in map(float, options.megabytes.split(","))
        for sites in map(int, options.sites.split(","))
    ]
    print(f"\nload of the machine after: {os.getloadavg()[0]:.1f}")
    what = "Flower's overhead of a round / fedvlm's, the smallest of all cases"
    if options.only or not flower:
        what = "seconds of overhead, the smallest of all cases; one side alone"
    print(f"RATIO {min(ratios):.2f} {what}")


def compare(sites: int, size: float, options: argparse.Namespace, flower: bool) -> float:
    """Measures a case and prints it.

    Returns:
        Flower's overhead over fedvlm's, or the seconds of overhead where one side runs alone.
    """
    found: dict[str, Outcome] = {}

    def ours(folder: Path, secure: bool = False) -> Outcome:
        repeats, most = options.repeats, options.at_once
        return _deploy.ours.measure(folder, sites, size, repeats, most, secure)

    def theirs(folder: Path) -> Outcome:
        shapes = found["fedvlm"].shapes if "fedvlm" in found else _deploy.ours.shapes(size)
        programs = options.venv.absolute() / "bin"
        return _deploy.flower.measure(folder, programs, QUIET, sites, shapes, options.repeats)

    sides: dict[str, Callable[[Path], Outcome]] = {}
    if options.only != "flower":
        sides["fedvlm"] = ours
        if options.secure:
            sides["fedvlm, secure"] = partial(ours, secure=True)
    if flower:
        sides["flower"] = theirs
    for name, measure in sides.items():
        prefix = f"fedvlm-deploy-{name.split(',')[0]}-"
        with tempfile.TemporaryDirectory(prefix=prefix) as folder, limited(LIMIT, name):
            found[name] = measure(Path(folder))
        show(name, sites, found[name])
    if "fedvlm, secure" in found:
        one, other = found["fedvlm, secure"], found["fedvlm"]
        print(
            f"secure / plain at {sites} sites: overhead {one.overhead / other.overhead:.2f}, "
            f"bytes up {one.sent / other.sent:.4f}",
            flush=True,
        )
    overheads = [outcome.overhead for name, outcome in found.items() if "secure" not in name]
    return overheads[-1] / overheads[0] if len(overheads) == 2 else overheads[0]


def show(name: str, sites: int, found: Outcome) -> None:
    spread = f"{min(found.overheads):.2f} to {max(found.overheads):.2f}"
    walls, own = statistics.median(found.walls), statistics.median(found.there)
    row = [name, str(sites), f"{found.sent / 1e6:.2f}", f"{found.overhead:.3f}", spread]
    row += [f"{walls:.3f}", f"{own:.3f}", f"{found.saving:.3f}" if found.saving else ""]
    row += [f"{found.peaks.get(which, 0):.0f}" for which in ("job", "server", "a client")]
    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

"""What was measured, in one file of the repository, so that later runs are added to it.

A line a run: its file in the output folder (`path`), and what that holds. A first line has the
learning rates that were chosen: they are chosen once, and what is added goes by them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from _personalization.runs import JOINS, MEASURED
from fedvlm.store.files import write_text

RATES = "rates.json"
NAME = "personalization.jsonl"

Rates = Mapping[tuple[str, str], float]  # (kind of regime, algorithm) -> learning rate


def unpack(file: Path, output: Path) -> int:
    """Puts what was measured where an output folder lacks it.

    Returns:
        The number of runs that are new there.
    """
    new = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        path = output / found.pop("path")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(found, indent=1) + "\n")
            new += path.name != RATES
    return new


def pack(output: Path, file: Path) -> None:
    """Writes the rates and all compared runs of an output folder, in the order of their names."""
    paths = sorted(path for name in (MEASURED, JOINS) for path in output.glob(f"runs/*/*/{name}"))
    lines = []
    for path in [output / RATES, *paths]:
        if path.exists():
            where = {"path": path.relative_to(output).as_posix()}
            lines.append(json.dumps(where | json.loads(path.read_text(encoding="utf-8"))))
    write_text(file, "".join(line + "\n" for line in lines))


def read_rates(output: Path) -> dict[tuple[str, str], float]:
    """The rates that were chosen before."""
    path = output / RATES
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {(kind, name): rate for kind, rates in found.items() for name, rate in rates.items()}


def keep_rates(output: Path, rates: Rates) -> None:
    """Notes the rates that are chosen now; where these are known, nothing is written."""
    if rates == read_rates(output):
        return
    tree: dict[str, dict[str, float]] = {}
    for (kind, name), rate in sorted(rates.items()):
        tree.setdefault(kind, {})[name] = rate
    write_text(output / RATES, json.dumps(tree, indent=1) + "\n")

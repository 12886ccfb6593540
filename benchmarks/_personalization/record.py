"""All measurements in one file of the repository. Later runs add to it.

Each line is a run: the path of its file in the output folder (`path`), and the content of that
file. The first line holds the learning rates. They are chosen once, and added runs use them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from _personalization.runs import JOINS, MEASURED
from fedvlm.errors import FedVLMError
from fedvlm.store.files import write_text

RATES = "rates.json"
NAME = "personalization.jsonl"

Rates = Mapping[tuple[str, str], float]  # (kind of regime, algorithm) -> learning rate


def unpack(file: Path, output: Path) -> int:
    """Writes the measurements that an output folder lacks.

    Returns:
        The number of runs that are new in the folder.

    Raises:
        FedVLMError: a run has no scores of its clients, so it is from before equal budgets.
    """
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if any("rows" in found and "clients" not in found for found in lines):
        raise FedVLMError(
            f"'{file}' holds runs without the scores of their clients, which no longer compare: "
            "leave out --add, and publish new runs"
        )
    new = 0
    for found in lines:
        path = output / found.pop("path")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(found, indent=1) + "\n")
            new += path.name in (MEASURED, JOINS)
    return new


def pack(output: Path, file: Path) -> None:
    """Writes the rates and all compared runs of an output folder to a file, sorted by name.

    Each run keeps the scores of its clients, so intervals can be computed from the file alone.
    """
    names = [f"runs/*/*/{name}" for name in (MEASURED, JOINS)]
    names += [f"real/*/*/{MEASURED}", "real/*/cell.json"]
    paths = sorted(path for name in names for path in output.glob(name))
    lines = []
    for path in [output / RATES, *paths]:
        if path.exists():
            where = {"path": path.relative_to(output).as_posix()}
            lines.append(json.dumps(where | json.loads(path.read_text(encoding="utf-8"))))
    write_text(file, "".join(line + "\n" for line in lines))


def read_rates(output: Path) -> dict[tuple[str, str], float]:
    """The rates chosen earlier."""
    path = output / RATES
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {(kind, name): rate for kind, rates in found.items() for name, rate in rates.items()}


def keep_rates(output: Path, rates: Rates) -> None:
    """Writes the chosen rates, unless the folder holds the same rates already."""
    if rates == read_rates(output):
        return
    tree: dict[str, dict[str, float]] = {}
    for (kind, name), rate in sorted(rates.items()):
        tree.setdefault(kind, {})[name] = rate
    write_text(output / RATES, json.dumps(tree, indent=1) + "\n")

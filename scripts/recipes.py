"""Plans every recipe of examples/recipes, and writes their table to the README.md beside them.

    python scripts/recipes.py            # renew the table
    python scripts/recipes.py --check    # exit 1 where the table is not current

The plan is that of ``fedvlm run RECIPE --dry-run``. The model's sizes come from a config.json in
examples/recipes/models, so neither the hub nor weights are needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from fedvlm.cli.tables import size
from fedvlm.config import load
from fedvlm.models import load as loading
from fedvlm.planning.forecast import Forecast, forecast
from fedvlm.settings.sections import Config

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "recipes"
PAGE = FOLDER / "README.md"
BEGIN, END = "<!-- written by scripts/recipes.py -->", "<!-- end of what is written -->"
ROWS = {  # of the split train, by the cards on the hub
    "flaviagiammarino/vqa-rad": 1_793,
    "flaviagiammarino/path-vqa": 19_654,
    "openbmb/RLAIF-V-Dataset": 83_132,
}
RUN: dict[str, str] = {}  # recipe -> what was run of it, with a date; the others were never run
HEAD = (
    "recipe", "data", "rows", "clients", "steps, all clients", "up, a client and round",
    "up, a round", "frozen weights", "a client", "GPU memory, at least", "run",
)  # fmt: skip


def recipes() -> list[Path]:
    """The recipes, by name."""
    return sorted(FOLDER.glob("*.yaml"))


def sizes_of(config: Config) -> Path:
    """The folder with the real sizes of a recipe's model."""
    return FOLDER / "models" / config.model.name.rpartition("/")[2]


def plan(recipe: Path) -> tuple[Config, Forecast]:
    """A recipe's settings, and its plan on the real sizes of its model.

    A plan needs no bitsandbytes, so its presence is not checked.
    """
    config = load(recipe)
    there = load(recipe, f"model.name={sizes_of(config)}", "model.device=cpu")
    with mock.patch.object(loading, "quantization", return_value={}):
        return config, forecast(there)


def row(recipe: Path) -> list[str]:
    """A recipe's row of the table."""
    config, found = plan(recipe)
    assert found.size is not None
    rows = min(ROWS[config.data.path or ""], config.data.max_rows or sys.maxsize)
    objective = "" if config.objective.name == "sft" else ", DPO"
    up = int(found.sent["up"].median)
    return [
        f"[{recipe.stem}]({recipe.name})",
        f"{config.data.path}{objective}",
        f"{rows:,}",
        str(found.clients),
        f"{found.all_steps:,}",
        size(up),
        size(up * (found.cohort or 0)),
        size(found.size.weights),
        size(found.size.each),
        size(found.size.weights + found.size.each),
        RUN.get(recipe.stem, "never"),
    ]


def table() -> Iterator[str]:
    """The lines of the table."""
    yield "| " + " | ".join(HEAD) + " |"
    yield "| " + " | ".join("---" for _ in HEAD) + " |"
    for recipe in recipes():
        yield "| " + " | ".join(row(recipe)) + " |"


def page() -> str:
    """The README with a current table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return before + "\n".join((BEGIN, "", *table(), "", END)) + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    text = page()
    current = text == PAGE.read_text(encoding="utf-8")
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    return int(check and not current)


if __name__ == "__main__":
    sys.exit(main())

"""Writes every recipe of examples/recipes, and the tables of their plans in the README.md there.

    python scripts/recipes.py            # renew the recipes and the tables
    python scripts/recipes.py --check    # exit 1 where they are not current

The recipes are those of ``_recipes.py``. A plan is that of ``fedvlm run RECIPE --dry-run``. The
model's sizes come from a config.json in examples/recipes/models, so neither the hub nor weights
are needed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from unittest import mock

import _recipes
from fedvlm.cli.tables import size
from fedvlm.config import load
from fedvlm.models import load as loading
from fedvlm.planning.forecast import Forecast, forecast
from fedvlm.settings.sections import Config

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "recipes"
PAGE = FOLDER / "README.md"
MARKS = "<!-- written by scripts/{script}: {name} -->", "<!-- end of {name} -->"
RUN: dict[str, str] = {}  # recipe -> what was run of it, with a date; the others were never run
RECIPES = (
    "recipe",
    "data",
    "rows",
    "clients",
    "steps",
    "up, a round",
    "GPU memory, at least",
    "run",
)
MODELS = (
    "model", "parameters", "frozen weights", "a client", "up, a client and round", "licence",
)  # fmt: skip
Planned = tuple[Path, Config, Forecast]


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


def row(recipe: Path, config: Config, found: Forecast) -> list[str]:
    """A recipe's row of the table."""
    task = next(t for t in _recipes.TASKS if t.name == config.data.path)
    name = task.title.partition("(")[2].partition(")")[0]
    size_of = found.size
    assert size_of is not None
    return [
        f"[{recipe.stem}]({recipe.name})",
        name if config.objective.name == "sft" else f"{name}, DPO",
        f"{min(task.rows, config.data.max_rows or task.rows):,}",
        str(found.clients),
        f"{found.all_steps:,}",
        size(found.sent["up"].median * (found.cohort or 0)),
        size(size_of.weights + size_of.each),
        RUN.get(recipe.stem, "never"),
    ]


def model_row(config: Config, found: Forecast) -> list[str]:
    """A model's row of the table."""
    name, size_of = config.model.name, found.size
    assert size_of is not None
    model = next(m for m in _recipes.MODELS if m.name == name)
    bits = "" if config.model.quantization == "none" else f", {config.model.quantization}"
    return [
        f"[{name.rpartition('/')[2]}](https://huggingface.co/{name}){bits}",
        f"{size_of.parameters:,}",
        size(size_of.weights),
        size(size_of.each),
        size(found.sent["up"].median),
        model.short,
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(text: str, tables: Mapping[str, str], script: str) -> str:
    """A page with other tables between the marks of a script."""
    for name, made in tables.items():
        begin, end = (mark.format(script=script, name=name) for mark in MARKS)
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{made}\n\n{end}{rest.partition(end)[2]}"
    return text


def page() -> str:
    """The README with current tables."""
    plans: list[Planned] = [(recipe, *plan(recipe)) for recipe in recipes()]
    models = {config.model.name: model_row(config, found) for _, config, found in plans}
    tables = {
        "recipes": table(RECIPES, itertools.starmap(row, plans)),
        "models": table(MODELS, models.values()),
    }
    return filled(PAGE.read_text(encoding="utf-8"), tables, Path(__file__).name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    wanted = {FOLDER / f"{name}.yaml": text for name, text in _recipes.texts().items()}
    current = wanted == {path: path.read_text(encoding="utf-8") for path in recipes()}
    if not check:
        for path in recipes():
            path.unlink()
        for path, text in wanted.items():
            path.write_text(text, encoding="utf-8")
    text = page()
    current = current and text == PAGE.read_text(encoding="utf-8")
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    return int(check and not current)


if __name__ == "__main__":
    sys.exit(main())

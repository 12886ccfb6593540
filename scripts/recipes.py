"""Plans every recipe of examples/recipes, and writes the tables of the README.md beside them.

    python scripts/recipes.py            # renew the tables
    python scripts/recipes.py --check    # exit 1 where they are not current

The plan is that of ``fedvlm run RECIPE --dry-run``. The model's sizes come from a config.json in
examples/recipes/models, so neither the hub nor weights are needed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from unittest import mock

from fedvlm.cli.tables import size
from fedvlm.config import load
from fedvlm.models import load as loading
from fedvlm.planning.forecast import Forecast, forecast
from fedvlm.settings.sections import Config

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "recipes"
PAGE = FOLDER / "README.md"
MARKS = "<!-- written by scripts/recipes.py: {} -->", "<!-- end of {} -->"
DATA = {  # name and rows of the split train, by the cards on the hub
    "flaviagiammarino/vqa-rad": ("VQA-RAD", 1_793),
    "flaviagiammarino/path-vqa": ("PathVQA", 19_654),
    "openbmb/RLAIF-V-Dataset": ("RLAIF-V", 83_132),
}
LICENCES = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": "Apache-2.0",
    "HuggingFaceTB/SmolVLM-500M-Instruct": "Apache-2.0",
    "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen Research Licence",
    "google/paligemma2-3b-pt-224": "Gemma terms, gated",
    "google/gemma-3-4b-it": "Gemma terms, gated",
    "florence-community/Florence-2-base": "MIT",
}
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
    name, rows = DATA[config.data.path or ""]
    size_of = found.size
    assert size_of is not None
    return [
        f"[{recipe.stem}]({recipe.name})",
        name if config.objective.name == "sft" else f"{name}, DPO",
        f"{min(rows, config.data.max_rows or rows):,}",
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
    bits = "" if config.model.quantization == "none" else f", {config.model.quantization}"
    return [
        f"[{name.rpartition('/')[2]}](https://huggingface.co/{name}){bits}",
        f"{size_of.parameters:,}",
        size(size_of.weights),
        size(size_of.each),
        size(found.sent["up"].median),
        LICENCES[name],
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    """The README with current tables."""
    plans: list[Planned] = [(recipe, *plan(recipe)) for recipe in recipes()]
    models = {config.model.name: model_row(config, found) for _, config, found in plans}
    text = PAGE.read_text(encoding="utf-8")
    tables = {
        "recipes": table(RECIPES, itertools.starmap(row, plans)),
        "models": table(MODELS, models.values()),
    }
    for name, made in tables.items():
        begin, end = (mark.format(name) for mark in MARKS)
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{made}\n\n{end}{rest.partition(end)[2]}"
    return text


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

"""examples/recipes: every recipe is valid, and its README shows the plan of its real sizes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import recipes
from fedvlm.config import load
from fedvlm.settings.sections import Config

PAGE = recipes.PAGE.read_text(encoding="utf-8")
ROWS = {
    found[1]: [cell.strip() for cell in line.strip(" |").split(" | ")]
    for line in PAGE.splitlines()
    if (found := re.match(r"\| \[([\w.-]+)\]\([\w.-]+\.yaml\)", line))
}
MODELS: dict[str, list[Path]] = {}
for path in recipes.recipes():
    MODELS.setdefault(load(path).model.name, []).append(path)


def test_the_table_names_every_recipe_and_no_other():
    assert list(ROWS) == [path.stem for path in recipes.recipes()]
    assert len(ROWS) == 12


@pytest.mark.parametrize("name", MODELS, ids=lambda name: name.rpartition("/")[2])
def test_the_table_shows_the_plan_on_the_real_sizes(name):
    first, *others = MODELS[name]
    assert ROWS[first.stem] == recipes.row(first)
    for other in others:  # the bytes and the memory are those of the model
        config, cells = load(other), ROWS[other.stem]
        assert config.lora == load(first).lora
        assert (cells[5], cells[7:]) == (ROWS[first.stem][5], ROWS[first.stem][7:])
        clients, train = config.partition.clients, config.train
        assert cells[3:5] == [str(clients), f"{clients * train.rounds * train.local_steps:,}"]


@pytest.mark.parametrize("name", MODELS, ids=lambda name: name.rpartition("/")[2])
def test_the_table_of_models_counts_their_parameters(name):
    from fedvlm.models.load import load_shapes

    config = load(MODELS[name][0]).model
    folder = recipes.sizes_of(load(MODELS[name][0]))
    model = load_shapes(config.model_copy(update={"name": str(folder), "quantization": "none"}))
    count = sum(p.numel() for p in model.parameters())
    assert re.search(rf"^\| \[{folder.name}\]\(.*/{name}\) \| {count:,} \|", PAGE, re.MULTILINE)


@pytest.mark.parametrize("path", recipes.recipes(), ids=lambda path: path.stem)
def test_a_recipe_says_what_it_takes_and_what_was_never_run(path):
    text, config = path.read_text(encoding="utf-8"), load(path)
    head = text.partition("\noutput:")[0]
    assert config.output == f"runs/{path.stem}"
    assert f"examples/recipes/{path.name}" in head
    assert config.data.path in head
    assert f"{recipes.ROWS[config.data.path]:,} rows" in head
    assert config.model.name in head
    assert ("gated" in head) == config.model.name.startswith("google/")
    assert ("\n# Never run:" in head) == (path.stem not in recipes.RUN)


def test_the_model_of_a_recipe_goes_with_the_data_of_any_other():
    trees = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in recipes.recipes()]
    pairs = {(a["model"]["name"], b["data"]["path"], b.get("objective", {}).get("name", "sft")): 0
             for a in trees for b in trees}  # fmt: skip
    assert len(pairs) == 24
    for tree in trees:
        for other in trees:
            assert isinstance(load({**other, "model": tree["model"]}), Config)

"""examples/recipes: every recipe is valid, and its README shows the plan of its real sizes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import _recipes
import memory
import recipes
from fedvlm.config import load

PAGE = recipes.PAGE.read_text(encoding="utf-8")
ROWS = {
    found[1]: [cell.strip() for cell in line.strip(" |").split(" | ")]
    for line in PAGE.splitlines()
    if (found := re.match(r"\| \[([\w.-]+)\]\([\w.-]+\.yaml\)", line))
}
TEXTS = _recipes.texts()
FILES = {path.stem: path for path in recipes.recipes()}
MODELS: dict[str, list[Path]] = {}
for path in recipes.recipes():
    MODELS.setdefault(load(path).model.name, []).append(path)


def test_the_table_names_every_recipe_and_no_other():
    assert list(ROWS) == [path.stem for path in recipes.recipes()]
    assert len(ROWS) == 24
    assert {name: recipe.read_text(encoding="utf-8") for name, recipe in FILES.items()} == TEXTS


@pytest.mark.parametrize("name", MODELS, ids=lambda name: name.rpartition("/")[2])
def test_the_tables_show_the_plan_on_the_real_sizes(name):
    first, *others = MODELS[name]
    config, found = recipes.plan(first)
    assert ROWS[first.stem] == recipes.row(first, config, found)
    assert f"| {' | '.join(recipes.model_row(config, found))} |" in PAGE.splitlines()
    for other in others:  # only the clients, the rows and the steps differ
        config, rounds = load(other), load(other).train
        clients = config.partition.clients
        assert (config.lora, config.model) == (load(first).lora, load(first).model)
        assert ROWS[other.stem][3:5] == [
            str(clients),
            f"{clients * rounds.rounds * rounds.local_steps:,}",
        ]
        assert ROWS[other.stem][5] == recipes.size(found.sent["up"].median * clients)
        assert ROWS[other.stem][6:] == ROWS[first.stem][6:]


def test_the_sizes_are_those_of_the_published_checkpoints():
    """By the hub; of PaliGemma 2 by KerasHub, and 64 words of 2,304 numbers more."""
    published = {
        "SmolVLM-256M-Instruct": 256_484_928,
        "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
        "paligemma2-3b-pt-224": 3_032_094_960 + 64 * 2_304,
        "gemma-3-4b-it": 4_300_079_472,
    }
    for name, count in published.items():
        assert re.search(rf"^\| \[{name}\]\([^)]*\)(?:, 4bit)? \| {count:,} \|", PAGE, re.MULTILINE)


@pytest.mark.parametrize("path", recipes.recipes(), ids=lambda path: path.stem)
def test_a_recipe_says_what_it_takes_and_what_was_never_run(path):
    text, config = path.read_text(encoding="utf-8"), load(path)
    head = text.partition("\noutput:")[0]
    assert config.output == f"runs/{path.stem}"
    assert f"examples/recipes/{path.name}" in head
    assert config.data.path in head
    (rows,) = {task.rows for task in _recipes.TASKS if task.name == config.data.path}
    assert f"{rows:,} rows" in head
    assert config.model.name in head
    assert ("gated" in head) == config.model.name.startswith("google/")
    assert ("\n# Never run:" in head) == (path.stem not in recipes.RUN)


def test_the_page_on_memory_has_the_plan_of_the_published_sizes():
    """By the hub: 7,063,427,072 and 2,246,272,880 parameters."""
    name, page = "llava-1.5-7b-hf", memory.PAGE.read_text(encoding="utf-8").splitlines()
    assert memory.plan(name, "bf16").parameters == 7_063_427_072
    assert memory.plan("SmolVLM-Instruct", "bf16").parameters == 2_246_272_880
    for row in (*memory.one_gpu(name), *memory.several_gpus(name)):
        assert f"| {' | '.join(row)} |" in page


def test_a_cell_has_the_clients_that_have_room_for_a_batch():
    gib, each = 2**30, 10**8
    free = int(0.8 * 10 * gib)  # of each GPU
    assert memory.cell(each, [free - 5 * (each + 10**9)], 10) == "5: 1.0"
    assert memory.cell(each, [free - each - 10**9 + 10], 10) == "no"
    assert (
        memory.cell(each, [0, free - 2 * (each + 10**9)], 10) == "4: 1.0"
    )  # the fuller one decides
    assert memory.cell(each, [0], 100) == f"16: {(0.8 * 100 * gib / 16 - each) / 1e9:.1f}"

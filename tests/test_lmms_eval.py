"""examples/lmms_eval: the task's functions, and the words that lmms-eval gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "lmms_eval"))

import vqa_rad

FOLDER = Path(vqa_rad.__file__).parent


class Loader(yaml.SafeLoader):
    """Reads ``!function module.name`` as the function, as lmms-eval does."""


def _function(loader: Loader, node: yaml.ScalarNode):
    module, _, name = loader.construct_scalar(node).rpartition(".")
    assert module == "vqa_rad"
    return getattr(vqa_rad, name)


Loader.add_constructor("!function", _function)
TASK = yaml.load((FOLDER / "vqa_rad.yaml").read_text(encoding="utf-8"), Loader)


def test_the_task_asks_the_bare_question_about_the_picture():
    row = {"image": Image.new("L", (4, 3)), "question": "Is there a fracture?", "answer": "no"}
    (picture,) = TASK["doc_to_visual"](row)
    assert (picture.mode, picture.size) == ("RGB", (4, 3))
    assert TASK["doc_to_text"](row, {"post_prompt": " Briefly."}) == "Is there a fracture?"
    assert row[TASK["doc_to_target"]] == "no"


@pytest.mark.parametrize(
    ("answer", "exact", "f1"),
    [
        ("left lung", 1.0, 1.0),
        ("the left lung", 0.0, 1.0),
        ("right lung", 0.0, 0.5),
        ("", 0.0, 0.0),
    ],
)
def test_the_scores_are_those_of_fedvlm(answer, exact, f1):
    found = TASK["process_results"]({"answer": "left lung"}, [answer])
    assert found == {"exact_match": exact, "token_f1": f1}
    assert list(found) == [each["metric"] for each in TASK["metric_list"]]


def test_the_script_exports_and_scores_the_base_and_the_merged_model(tmp_path):
    for name in ("fedvlm", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    words = ["runs/mine", "site-0", "some/base", "pope,vqa_rad"]
    done = subprocess.run(
        [str(FOLDER / "score.sh"), *words], capture_output=True, text=True, check=True,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    export, base, merged = done.stdout.splitlines()
    assert export == "fedvlm export runs/mine --client site-0 --merge"
    common = f"--tasks pope,vqa_rad --include_path {FOLDER} --batch_size 1 --log_samples"
    for line, weights, folder in (
        (base, "some/base", "base"),
        (merged, "runs/mine/export/site-0-merged", "site-0-merged"),
    ):
        model = f"--model huggingface --model_args pretrained={weights}"
        out = f"--output_path runs/mine/lmms_eval/{folder}"
        assert line == f"python -m lmms_eval {model} {common} {out}"

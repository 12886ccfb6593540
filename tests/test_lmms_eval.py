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


@pytest.mark.parametrize("family", ["", "qwen2_5_vl"])
def test_the_script_exports_and_scores_the_base_and_the_merged_model(tmp_path, family):
    for name in ("fedvlm", "python", "transformers", "curl"):
        told = "sleep 9" if name == "transformers" else f'echo {name} "$@"'
        (tmp_path / name).write_text(f"#!/bin/sh\n{told}\n")
        (tmp_path / name).chmod(0o755)
    words = ["runs/mine", "site-0", "some/base", "pope,vqa_rad", *([family] if family else [])]
    places = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "LMMS_EVAL": "--limit 8"}
    done = subprocess.run(
        [str(FOLDER / "score.sh"), *words], capture_output=True, text=True, check=True,
        env={**os.environ, **places},
    )  # fmt: skip
    export, *waited, base, merged = done.stdout.splitlines()
    assert export == "fedvlm export runs/mine --client site-0 --merge"
    assert [line.split()[0] for line in waited] == ([] if family else ["curl"])
    common = f"--tasks pope,vqa_rad --include_path {FOLDER} --batch_size 1 --log_samples"
    for line, weights, folder in (
        (base, "some/base", "base"),
        (merged, "runs/mine/export/site-0-merged", "site-0-merged"),
    ):
        asks = f"model_version={weights},base_url=http://localhost:8071/v1,api_key=none"
        model = f"--model openai --model_args {asks},timeout=600,num_concurrent=1"
        if family:
            model = f"--model {family} --model_args pretrained={weights}"
        out = f"--output_path runs/mine/lmms_eval/{folder} --limit 8"
        assert line == f"python -m lmms_eval {model} {common} {out}"

"""The benchmarks start. Their numbers need a quiet machine, so they are not run here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(p.name for p in FOLDER.glob("*.py") if not p.name.startswith("_"))
RUN = """
import contextlib, io, json, runpy, sys, traceback

def run(script, *words):
    sys.argv, code, out = [script, *words], 0, io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            code = traceback.format_exc()
    return code, out.getvalue()

sys.path.insert(0, "")
print(json.dumps({" ".join(words): run(*words) for words in json.loads(sys.argv[1])}))
"""


SMALL = "gpu.py --device cpu --quick --repeats 1 --model smolvlm-500m --target language"


@pytest.fixture(scope="module")
def ran():
    """Command -> exit code, output: all scripts run one after the other in one process."""
    commands = [[name, "--help"] for name in SCRIPTS] + [["gpu.py"], SMALL.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_has_help_and_is_in_the_list(name, ran):
    code, out = ran[f"{name} --help"]
    assert code == 0, code
    assert "--quick" in out
    assert f"## `{name}`" in (FOLDER / "README.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_ends_in_peace_where_there_is_no_gpu(ran):
    code, out = ran["gpu.py"]
    assert code == 0, code
    assert "no GPU" in out


def test_the_gpu_benchmark_works_on_small_shapes_without_a_gpu(ran):
    code, out = ran[SMALL]
    assert code == 0, code
    assert float(out.splitlines()[-1].split()[1]) > 0, out

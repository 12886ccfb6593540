"""examples/quickstart.ipynb: its cells run, and its stored outputs are those of these cells.

The cells run in one process without IPython, which would bring 90 MB of packages for one test.
``scripts/notebook.py`` runs them in a real kernel, and stores what they print.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
TEXT = NOTEBOOK.read_text(encoding="utf-8")
CELLS = [cell for cell in json.loads(TEXT)["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]
SHORTER = {
    "rows=100": "rows=20",
    '"rounds": 16': '"rounds": 1',
    '"local_steps": 8': '"local_steps": 1',
}


def shown(source: str) -> str:
    """A cell as a program that shows the value of its last line, without lines for IPython."""
    tree = ast.parse("\n".join(x for x in source.splitlines() if not x.startswith("%")))
    if isinstance(tree.body[-1], ast.Expr):
        call = ast.Name("show", ast.Load())
        tree.body[-1].value = ast.Call(call, [tree.body[-1].value], [])
    return ast.unparse(ast.fix_missing_locations(tree))


def test_the_cells_run(tmp_path, warm):
    program = "show = lambda value: print('shown:', type(value).__name__)\n"
    program += "\n".join(map(shown, SOURCES))
    for long, short in SHORTER.items():
        assert program.count(long.replace('"', "'")) == 1
        program = program.replace(long.replace('"', "'"), short)
    (tmp_path / "cells.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [str(warm.python), "cells.py"], cwd=tmp_path, env=warm.env,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = re.findall("^shown: (.+)$", done.stdout, re.MULTILINE)
    assert kinds == ["tuple", "Image", "Results", "DataFrame", "Figure", "DataFrame", "dict"]
    for name in ("table.json", "report.html"):
        assert (tmp_path / "runs" / "quickstart" / name).exists()


def test_the_outputs_are_stored_small_and_without_paths_of_a_machine():
    assert len(TEXT.encode()) < 300_000
    assert [cell["execution_count"] for cell in CELLS if cell["outputs"]] != []
    assert all(cell["execution_count"] for cell in CELLS)
    kinds = [output["output_type"] for cell in CELLS for output in cell["outputs"]]
    assert "error" not in kinds
    assert kinds.count("execute_result") == 7
    text = re.sub(r'"image/png": "[^"]+"', "", TEXT)
    assert not re.findall(r"(?:/tmp|/home|/root|/Users|site-packages)[/\w.-]*", text)


def test_the_numbers_of_the_stored_outputs_agree():
    (line,) = re.findall(r"personal ([\d.]+) %>", TEXT)
    (html,) = ("".join(o["data"]["text/html"]) for c in CELLS for o in c["outputs"]
               if "Results of" in "".join(o.get("data", {}).get("text/html", "")))  # fmt: skip
    personal = re.findall(r"<td>([\d.]+) %</td>\s*</tr>", html)
    assert len(personal) == 3
    assert abs(sum(map(float, personal)) / 3 - float(line)) < 0.1

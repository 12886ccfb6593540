"""Runs examples/quickstart.ipynb in a real kernel, and keeps its outputs.

    pip install -e '.[docs]' && python scripts/notebook.py

The outputs are kept as they are, without three things: the times of the cells, a copy of each
picture as JPEG, and the advice of tqdm to install ipywidgets, which names a path of this machine.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


def main() -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        NotebookClient(
            book, timeout=600, kernel_name="python3", record_timing=False,
            resources={"metadata": {"path": folder}},
        ).execute()  # fmt: skip
    for cell in book.cells:
        if cell.cell_type == "code":
            found = cell.outputs
            cell.outputs = [x for x in found if "IProgress not found" not in x.get("text", "")]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)
    NOTEBOOK.write_text(nbformat.writes(book).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

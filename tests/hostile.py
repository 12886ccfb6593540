"""A small run whose names and texts would break a page that took them for syntax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fedvlm

SITES = ("</script><b>x", "a.b[0]", "__proto__")
QUESTION = "Is <img src=x onerror=alert(1)> {{ 7 * 7 }} or 'a' \\u003c \"b\"?"
COLUMN = "'><i>.chosen"


def settings(folder: Path) -> dict[str, Any]:
    """The settings of the run, whose rows are written to the folder."""
    table = fedvlm.scenes(style="mixed", sites=3, rows=16).to_pandas()
    names = dict(zip(sorted(table["site"].unique()), SITES, strict=True))
    table["site"] = table["site"].map(names)
    table["question"] = QUESTION
    table[COLUMN] = "<u>" + table["chosen"].astype(str)
    table.to_parquet(folder / "rows.parquet", index=False)
    return {
        "output": str(folder / "run"),
        "data": {"path": str(folder / "rows.parquet"), "columns": {"answer": COLUMN}},
        "partition": {"kind": "column", "column": "site", "min_rows": 4},
        "algorithm": {"name": "plora"},
        "train": {"rounds": 2, "local_steps": 2, "batch_size": 4},
        "eval": {"every": 1, "max_rows": 3, "max_new_tokens": 3},
        "lora": {"rank": 2, "alpha": 4, "target": "language"},
        "engine": {"threads": 1},
    }

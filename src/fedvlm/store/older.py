"""Runs of older versions, which have another form."""

from __future__ import annotations

import json
from pathlib import Path

from fedvlm.errors import FedVLMError


def check_version(folder: str | Path) -> None:
    """Refuses a run of version 0.1, whose settings and files have another form.

    Raises:
        FedVLMError: naming the version that opens it.
    """
    path = Path(folder) / "environment.json"
    try:
        made = json.loads(path.read_text(encoding="utf-8"))["packages"]["fedvlm"]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # the run says so where it matters
        return
    if str(made).startswith("0.1."):
        raise FedVLMError(
            f"the run in '{folder}' was made by fedvlm {made}, whose runs this version cannot open "
            "or resume; use pip install 'fedvlm<0.2' for it"
        )

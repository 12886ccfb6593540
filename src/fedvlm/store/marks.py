"""The checkpoint of a run: its keys, its mark, and whether rounds are added to a finished run."""

from __future__ import annotations

import json
from pathlib import Path

from fedvlm.errors import FedVLMError
from fedvlm.store import sealed

CHECKPOINT, DONE = "checkpoint.json", "table.json"
STATE = ("round", "server", "metrics", "packs")  # of the checkpoint: what a round changes
BEFORE, FINISHED, PLANNED = "before", "finished", "planned"
"""Of the checkpoint: ``STATE`` before the ending, from which a run can go on; the mark of the
finished run whose tables stand until the added rounds are done; earlier numbers of rounds."""


def mark(folder: str | Path) -> str:
    """A digest of a run's last finished round: equal for equal runs, wherever they lie.

    Raises:
        FedVLMError: ``checkpoint.json`` is missing or damaged.
    """
    found = sealed.read(Path(folder) / CHECKPOINT)
    content = {key: found[key] for key in STATE if key in found} | {"files": None}
    return sealed.blake(json.dumps(content, sort_keys=True).encode())


def goes_on(folder: str | Path) -> bool:
    """Whether rounds are being added to a finished run, whose tables stand until the end."""
    path = Path(folder)
    try:
        known = sealed.read(path / CHECKPOINT).get(FINISHED)
        return known is not None and known == sealed.read(path / DONE)["files"].get(CHECKPOINT)
    except (FedVLMError, KeyError):  # the reader of a damaged file names it
        return False

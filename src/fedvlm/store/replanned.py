"""A run that is told another number of rounds: its folder goes back to the time before the ending.

The checkpoint gets the text of the new ``config.yaml`` first, and then the file is written. A
process that is killed in between leaves both, and the next reader of the run writes the file. The
tables of a finished run stay where they are until the added rounds are done.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fedvlm.store import sealed
from fedvlm.store.files import write_text
from fedvlm.store.marks import BEFORE, CHECKPOINT, FINISHED, PLANNED, STATE, mark
from fedvlm.store.run import CONFIG, Store, is_done

STOPPED = "stopped"
MADE = "made.json"  # the digests of an adapter that was made at a request


def trained(folder: str | Path) -> int:
    """The number of a run's finished rounds, its ending left out; 0 before the first."""
    found = sealed.read(Path(folder) / CHECKPOINT)
    return (found.get(BEFORE) or found)["round"] or 0


def planned(folder: str | Path) -> list[dict[str, Any]]:
    """The earlier numbers of rounds of a run, in order; empty for most runs.

    Each has ``rounds``, the number; ``done``, the rounds that were done when it changed; and
    ``stopped: True`` where the rounds had ended early by themselves.
    """
    path = Path(folder) / CHECKPOINT
    return list(sealed.read(path).get(PLANNED, ())) if path.exists() else []


def stopped(folder: str | Path) -> int | None:
    """The number of rounds that a run was told, where its rounds ended early; else None."""
    changes = planned(folder)
    return changes[-1]["rounds"] if changes and changes[-1].get(STOPPED) else None


def replan(store: Store, text: str, rounds: int, early: bool = False) -> None:
    """Goes back to the time before the ending, with other settings. The caller holds the lock.

    Args:
        store: the folder of the run.
        text: the new ``config.yaml``.
        rounds: the number of rounds that the run was told before.
        early: whether the rounds end early by themselves.
    """
    folder = store.folder
    now = sealed.read(folder / CHECKPOINT)
    state = now.get(BEFORE) or {key: now[key] for key in STATE if key in now}
    finished = mark(folder) if is_done(folder) else now.get(FINISHED)
    change = {"rounds": rounds, "done": state["round"] or 0} | ({STOPPED: True} if early else {})
    found = {
        **state,
        "files": now["files"] | {CONFIG: sealed.blake(text.encode())},
        PLANNED: [*now.get(PLANNED, ()), change],
        CONFIG: text,
        **({FINISHED: finished} if finished else {}),
    }
    sealed.write(folder / CHECKPOINT, found, indent=None)
    write_text(folder / CONFIG, text)
    store.reread()
    # Adapters that were made at a request, and the audit, are of the models before.
    for made in folder.glob(f"adapters/*/{MADE}"):
        shutil.rmtree(made.parent)
    (folder / "audit.json").unlink(missing_ok=True)

"""Names of a run's models in tables and messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedvlm.errors import FedVLMError
from fedvlm.store.run import CONFIG

GLOBAL, UNTUNED = "global", "untuned"
COLUMNS = (GLOBAL, UNTUNED, "image", "row", "question", "answer", "model", "data")


def label(client: str) -> str:
    """The name of a client's column, distinct from all other columns of a table of answers."""
    return f"client {client}" if client in COLUMNS or client.startswith("client ") else client


def none_chosen(clients: Sequence[str], most: int = 3) -> FedVLMError:
    """The error for a command without a chosen model."""
    some = ", ".join(clients[:most]) + (", ..." if len(clients) > most else "")
    return FedVLMError(f"choose a model: --client NAME ({some}), --global, --untuned, or --all")


def no_run(path: Path) -> str:
    """The message for a folder that holds no run."""
    if not path.exists():
        return f"there is no folder '{path}'; give the folder of a run, its 'output'"
    inside = sorted(p.parent for p in path.glob(f"*/{CONFIG}"))
    if inside:
        return f"'{path}' holds {len(inside)} runs; choose one, such as '{inside[0]}'"
    return f"'{path}' holds no run; give a run's folder, or start a run: fedvlm run output={path}"

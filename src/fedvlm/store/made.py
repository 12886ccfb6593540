"""The version of fedvlm that has made a run, for messages about what another cannot read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from fedvlm.errors import ConfigError, FedVLMError, shown
from fedvlm.version import __version__, minor


def made_by(folder: str | Path) -> str:
    """The version in ``environment.json`` of a run; empty if it is not known."""
    path = Path(folder) / "environment.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["packages"]["fedvlm"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""  # the run says so where it matters
    return shown(found, 20, quotes=False) if minor(found) else ""


def check_version(folder: str | Path) -> None:
    """Refuses a run of version 0.1, whose settings and files have another form.

    Raises:
        FedVLMError: naming the version that opens it.
    """
    made = made_by(folder)
    if minor(made) == "0.1":
        raise FedVLMError(
            f"the run in '{folder}' was made by fedvlm {made}, whose runs this version cannot open "
            "or resume; use pip install 'fedvlm<0.2' for it"
        )


@contextlib.contextmanager
def settings_of(folder: str | Path) -> Iterator[None]:
    """For reading the settings of a run: an error about them names the version that reads them.

    Raises:
        FedVLMError: the settings cannot be read, and another minor version has made the run.
    """
    try:
        yield
    except ConfigError as error:
        made = made_by(folder)
        if minor(made) in ("", minor(__version__)):
            raise
        raise FedVLMError(
            f"the run in '{folder}' was made by fedvlm {made}, and this is fedvlm {__version__}, "
            f"which cannot read its settings; use pip install 'fedvlm=={minor(made)}.*' for it. "
            f"In detail, {error}"
        ) from error

"""Pictures of held-out rows, shrunk until they fit into the page."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedvlm import hub
from fedvlm.data.fingerprint import content
from fedvlm.data.pictures import Pictures
from fedvlm.errors import FedVLMError, shown
from fedvlm.rounds.prepare import rows_of
from fedvlm.settings.sections import Config

SIDE = 200  # pixels of the longer side
QUALITY = 60  # of the JPEG
MOST = 4  # pictures of a row that are shown


class Rows:
    """The rows of a run, read again from its data.

    Args:
        config: the settings of the run.
        folder: the run's folder.

    Raises:
        FedVLMError: the data are gone, or are not those of the run.
    """

    def __init__(self, config: Config, folder: Path):
        with _quiet(), hub.from_cache():
            self._rows = rows_of(config)
        _check(self._rows, folder, config)
        self._pictures = Pictures.of(config.data)
        numbers = np.asarray(self._rows["row"][:])
        self._places: Mapping[Any, int] = {n: at for at, n in enumerate(numbers.tolist())}

    def __call__(self, number: Any, reference: str) -> tuple[str, str] | None:
        """The question of a row, and its pictures, side by side, as a ``data:`` address.

        Args:
            number: the row's number in the source.
            reference: the expected answer.

        Returns:
            None if there is no such row. The picture is empty where it does not open.
        """
        place = self._places.get(number)
        if place is None:
            return None
        row = self._rows[place]
        if row["answer"] != reference:
            return None
        try:
            return row["question"], address(self._pictures.open_all(row["image"]))
        except (FedVLMError, OSError):
            return row["question"], ""


def address(images: Sequence[Any]) -> str:
    """A small JPEG of pictures as a ``data:`` address. It shows a few of many pictures."""
    for image in (shown := list(images[:MOST])):
        image.thumbnail((SIDE, SIDE))
    whole = shown[0]
    if len(shown) > 1:
        size = sum(image.width for image in shown), max(image.height for image in shown)
        whole, left = Image.new("RGB", size, "white"), 0
        for image in shown:
            whole.paste(image, (left, 0))
            left += image.width
    out = io.BytesIO()
    whole.convert("RGB").save(out, format="JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _check(rows: Any, folder: Path, config: Config) -> None:
    """Refuses rows other than those of the run. Its canaries have other answers in the run."""
    known = json.loads((folder / "data.json").read_bytes())
    if len(rows) > known["rows"] and config.data.on_error == "skip":
        return  # the run has left out the rows that its model cannot take
    if len(rows) == known["rows"]:
        now = content(rows)
        same = (c for c in ("row", "question", "image") if c in known["columns"])
        if all(now.get(c) == known["columns"][c] for c in same):
            return
    raise FedVLMError(f"the data have changed since the run: {shown(len(rows))} rows are there now")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings on rows, which the run has given."""

    def none(record: logging.LogRecord) -> bool:
        return False

    log = logging.getLogger("fedvlm")
    log.addFilter(none)
    try:
        yield
    finally:
        log.removeFilter(none)

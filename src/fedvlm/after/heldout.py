"""The held-out rows of a finished run, by site and number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedvlm.after.opened import Opened
from fedvlm.errors import FedVLMError, shown
from fedvlm.rounds.beginning import check_same, described
from fedvlm.rounds.prepare import divide, usable
from fedvlm.rounds.progress import Quiet

if TYPE_CHECKING:
    from PIL import Image

    from fedvlm.models.load import Loaded


@dataclass(frozen=True)
class Row:
    """One held-out row.

    Attributes:
        images: its pictures, opened.
        question: its question, as the models got it.
        reference: the answer in the data.
    """

    images: list[Image.Image]
    question: str
    reference: str


class HeldOut:
    """The rows that the sites of a run have not trained on.

    Args:
        run: the run.
        loaded: its base model, which decides which rows can be used.

    Attributes:
        counts: site -> the number of its held-out rows.

    Raises:
        FedVLMError: the rows are not here, or they are not those of the run.
    """

    def __init__(self, run: Opened, loaded: Loaded):
        if run.deployed:
            raise FedVLMError("the held-out rows of a deployed run are at the sites, not here")
        config = run.config
        rows, partition = divide(config)
        collator, partition = usable(config, rows, partition, loaded, None, Quiet())
        now = described(config, collator.rows, partition)
        check_same(run.folder, {name: now[name] for name in ("data.json", "partition.json")})
        self._rows, self._pictures = collator.rows, collator.pictures
        self._places = {
            client: getattr(split, config.eval.split) for client, split in partition.splits.items()
        }
        self.counts = {client: len(places) for client, places in self._places.items()}

    def row(self, site: str, number: int) -> Row:
        """A held-out row of a site; the first one has the number 1.

        Raises:
            FedVLMError: there is no such row.
        """
        if not 1 <= number <= self.counts.get(site, 0):
            raise FedVLMError(
                f"site {shown(site)} has {self.counts.get(site, 0)} held-out rows; got the number "
                f"{number}"
            )
        row = self._rows[int(self._places[site][number - 1])]
        return Row(self._pictures.open_all(row["image"]), row["question"], row["answer"])

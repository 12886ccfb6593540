"""``fedvlm demo``: its settings, two minutes on two cores, and its last table."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedvlm.after.predict import SideBySide

ALGORITHMS = ("auto", "fedsa", "lora", "plora", "local")
"""In this order, one of two processes runs the two longest, and the other one the three others."""

SETTINGS = {
    "output": "runs/demo",
    "data": {
        "scenes": {"style": "odd", "strength": 1.0, "sites": 8, "rows": 100},
        "test_fraction": 0.5,
    },
    "lora": {"target": "language"},
    "train": {"rounds": 12, "local_steps": 10, "batch_size": 4, "lr": 5e-3},
    "eval": {
        "every": 4,
        "max_rows": 50,
        "max_new_tokens": 18,
        "global_before": False,
        "personal_before": False,  # in no table or curve of the demo
    },
}

INTRODUCTION = """\
Eight sites ask questions about pictures. Seven sites answer in German. The
last one, site-7, answers in English, as the model does before training. No
site shares its data. All sites start from one small vision-language model
and train LoRA adapters (factors A and B) for the same number of steps:

  auto     the default: A is averaged; the sites vote with validation rows
           on the B they begin a round with: average, own, or between
  fedsa    FedSA-LoRA: A is averaged, B stays at each site
  plora    personalized LoRA (FedVLM): B is averaged, A stays at each site
  lora     standard federated LoRA: both are averaged, one model for all
  local    every site trains alone

In the end: a verdict for each site (should it take part, and how?), and the
answers of all models to one picture.
"""


class Picture:
    """The answers of a run's models to one held-out picture."""

    def __init__(self) -> None:
        self._found: dict[Path, SideBySide] = {}

    def ask_early(self, folders: Sequence[Path]) -> None:
        """Asks the models of the first run, if it is done, while other runs go on.

        A failure is left to :meth:`print`: it must not end the other runs.
        """
        from fedvlm.after.predict import side_by_side

        first = [folder for folder in folders if folder.name.startswith(f"{ALGORITHMS[0]}-")][:1]
        with contextlib.suppress(Exception):
            self._found |= {folder: side_by_side(folder) for folder in first}

    def print(self, run: Path) -> None:
        """Prints the answers, and saves the picture beside the run's folder."""
        from fedvlm.after.predict import side_by_side
        from fedvlm.cli.aftertables import print_side_by_side
        from fedvlm.store.files import write_bytes

        found = self._found.get(run) or side_by_side(run)
        picture = run.parent / "picture.png"
        write_bytes(picture, found.image)
        print_side_by_side(found, picture, run.name)

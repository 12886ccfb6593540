"""One model, its rows, and the uploads of all cases, made when first asked for."""

from __future__ import annotations

import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path

from _inversion.simulate import Simulator
from _inversion.uploads import Case, Observed, Source, observe, order, ready
from _inversion.words import Words
from fedvlm.engines.cohort import CohortEngine
from fedvlm.privacy.chance import Seeded


class Lab:
    """Makes uploads, and what a server needs to attack them.

    Args:
        source: the model and the rows.
    """

    def __init__(self, source: Source):
        self.source = source
        self._kept: dict[tuple[Case, int], list[Observed]] = {}

    def uploads(self, case: Case, draw: int = 0) -> list[Observed]:
        """What the server holds about each site.

        Args:
            case: the settings.
            draw: number of the draw of the noise. The attacks do not use it.
        """
        key = case, draw
        if key not in self._kept:
            self._kept[key] = self._run(case, draw)[1]
        return self._kept[key]

    @cached_property
    def rows(self) -> list[int]:
        """The training rows of all sites, in order."""
        return self._order[: self.source.rows]

    @cached_property
    def known(self) -> list[int]:
        """The rows that belong to no site. The server may know them."""
        return self._order[self.source.rows :]

    @cached_property
    def simulator(self) -> Simulator:
        """The server's simulation of a site, for adapters of the usual rank."""
        return Simulator(self._engine)

    @cached_property
    def words(self) -> Words:
        """The vocabulary, and the texts of rows."""
        return Words(self._engine.model, self._engine.collator, self.known)

    def texts(self, row: int) -> tuple[str, str]:
        """The question and the answer of a row."""
        found = self._engine.collator.rows[row]
        return found["question"], found["answer"]

    @cached_property
    def _engine(self) -> CohortEngine:
        return self._run(Case("plora"), 0)[0]

    @cached_property
    def _order(self) -> list[int]:
        return [int(row) for row in order(self.source, len(self._engine.collator.rows))]

    def _run(self, case: Case, draw: int) -> tuple[CohortEngine, list[Observed]]:
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            engine = ready(self.source, case, Path(folder), Seeded(draw))
            found = observe(engine)
        taken = time.process_time() - began
        print(f"{taken:6.1f} s of CPU: {case}", file=sys.stderr, flush=True)
        return engine, found

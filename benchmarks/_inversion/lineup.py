"""Attack by a line-up: which of a hundred candidates is in the upload?

The server imagines each candidate as the site's row, computes its gradient, and compares it with
the site's change. The line-up is over the whole row, over the picture (the server knows the texts),
or over the texts (the server does not know the picture, and imagines the mean picture).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from _inversion.simulate import Gradients, Simulator, likeness
from fedvlm.tree import Tree

KINDS = ("row", "picture", "text")
SIZE = 100  # candidates, the right one included


class Lineup:
    """Candidates for rows of sites that began a round with the same model.

    Args:
        simulator: computes gradients.
        begin: the model at the start of the round, as the server knows it.
        names: the factors that are compared.
        known: rows that belong to no site.
        rows: the rows of the sites. No wrong candidate has the picture of such a row, or for a
            line-up of texts its texts.
    """

    def __init__(
        self,
        simulator: Simulator,
        begin: Tree,
        names: Sequence[str],
        known: Sequence[int],
        rows: Sequence[int],
    ):
        self.simulator, self.begin, self.names = simulator, begin, names
        self._others = distinct(simulator, known, rows, "picture")[: SIZE - 1]
        self._texts = distinct(simulator, known, rows, "text")[: SIZE - 1]
        self._mean = simulator.pictures(known).mean(0, keepdim=True)

    def ranks(
        self, row: int, kind: str, goals: Sequence[Tree], noisy: Sequence[bool]
    ) -> list[float]:
        """The place of the right candidate for each observed change, from 1; ties count half.

        Args:
            row: the right candidate.
            kind: one of :data:`KINDS`.
            goals: the changes downhill.
            noisy: for each change, whether it has noise, see :func:`likeness`.
        """
        imagined = self._imagined(row, kind)
        found = []
        for goal, loud in zip(goals, noisy, strict=True):
            first, *rest = likeness(imagined, goal, loud).tolist()
            found.append(1 + sum((r > first) + 0.5 * (r == first) for r in rest))
        return found

    def size(self, kind: str) -> int:
        """The number of candidates."""
        return 1 + len(self._texts if kind == "text" else self._others)

    def _imagined(self, row: int, kind: str) -> Gradients:
        of_rows, begin, names = self.simulator.of_rows, self.begin, self.names
        if kind == "picture":
            pictures = self.simulator.pictures([row, *self._others])
            return of_rows(begin, [row] * len(pictures), names, pictures)
        own = of_rows(begin, [row], names, self._mean if kind == "text" else None)
        wrong = self._wrong_texts if kind == "text" else self._wrong_rows
        return {n: torch.cat([own[n], wrong[n]]) for n in names}

    @cached_property
    def _wrong_rows(self) -> Gradients:
        return self.simulator.of_rows(self.begin, self._others, self.names)

    @cached_property
    def _wrong_texts(self) -> Gradients:
        shown = self._mean.expand(len(self._texts), -1, -1, -1)
        return self.simulator.of_rows(self.begin, self._texts, self.names, shown)


def distinct(
    simulator: Simulator, known: Sequence[int], rows: Sequence[int], kind: str
) -> list[int]:
    """The known rows without those that repeat a picture, or texts, of the rows or each other."""

    def key(row: int) -> object:
        encoded = simulator.collator.features(int(row))
        if kind == "text":
            return (*encoded.prompt.tolist(), *encoded.answers[0].tolist())
        return encoded.extras["pixel_values"].numpy().tobytes()

    seen, found = {key(row) for row in rows}, []
    for row in known:
        if (own := key(row)) not in seen:
            seen.add(own)
            found.append(int(row))
    return found

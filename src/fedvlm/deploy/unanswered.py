"""The ways in which a site does not answer the server, and its pause after failures."""

from __future__ import annotations

from dataclasses import dataclass


class Unanswered(Exception):
    """A site gave no answer, or an invalid answer."""


class Declined(Unanswered):
    """A site refuses a request. It works, and is asked again in the next round."""


class Exhausted(Declined):
    """A site refuses a round because the run has no privacy left there."""


class Gone(Unanswered):
    """A site cannot be reached: its machine or the network may be down."""


@dataclass
class Bench:
    """The failures of a site in a row, and the round from which the server asks it again."""

    failures: int = 0
    until: int = 0

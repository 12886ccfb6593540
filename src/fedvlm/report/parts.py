"""The parts of a page, as plain data: the template turns them into HTML.

Every text here is a text. Nothing in it is read as HTML, as Markdown or as a formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST = 200  # rows of a table; the files of a run have all of them


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: the paragraph.
        kind: empty, ``head`` (a heading), ``strong``, ``note`` (an aside), or ``warning``.
    """

    text: str
    kind: str = ""
    part: str = "text"


@dataclass(frozen=True)
class Items:
    """A list of sentences, with a heading."""

    items: Sequence[str]
    head: str = ""
    part: str = "items"


@dataclass(frozen=True)
class Terms:
    """Words with their meaning."""

    terms: Mapping[str, str]
    head: str = ""
    part: str = "terms"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: what the table shows.
        heads: the heads of the columns.
        rows: the cells. The first cell names its row.
        texts: positions of columns with words, which are aligned to the left. The first column is
            one of them.
        foot: the last rows, such as means.
        left_out: number of rows that are not shown.
        more: where they are.
        folded: whether a reader opens the table first.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset()
    foot: Sequence[Sequence[str]] = ()
    left_out: int = 0
    more: str = ""
    folded: bool = False
    part: str = "table"


@dataclass(frozen=True)
class Key:
    """A line of a chart's legend.

    Attributes:
        name: the name of the series.
        glyph: its shape.
        colour: its colour, the name of a variable of the style sheet.
    """

    name: str
    glyph: str
    colour: str


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        spec: a specification of Vega-Lite.
        title: what the chart shows.
        note: how to read it.
        keys: its legend.
    """

    spec: Mapping[str, Any]
    title: str
    note: str = ""
    keys: Sequence[Key] = ()
    part: str = "chart"


@dataclass(frozen=True)
class Code:
    """Text as a computer reads it: a command, a file."""

    text: str
    title: str = ""
    folded: bool = False
    part: str = "code"


@dataclass(frozen=True)
class Verdict:
    """One site's verdict.

    Attributes:
        site: the site.
        mark: ``better``, ``worse`` or ``unclear``.
        head: the verdict in a few words.
        text: the numbers behind it.
    """

    site: str
    mark: str
    head: str
    text: str


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of all sites."""

    verdicts: Sequence[Verdict]
    left_out: int = 0
    part: str = "verdicts"


@dataclass(frozen=True)
class Answered:
    """One model's answer to a row.

    Attributes:
        model: the model.
        text: its answer.
        score: the score of the answer, for people.
        right: whether it is the reference; None where the metric is no matter of right or wrong.
    """

    model: str
    text: str
    score: str
    right: bool | None


@dataclass(frozen=True)
class Example:
    """A held-out row with the answers of all models.

    Attributes:
        row: its number in the source.
        question: its question; None where the data are not there.
        reference: the expected answer.
        answers: the models' answers.
        picture: the picture as a ``data:`` address; empty without one.
        differs: whether the models answer differently.
    """

    row: str
    question: str | None
    reference: str
    answers: Sequence[Answered]
    picture: str
    differs: bool


@dataclass(frozen=True)
class Examples:
    """Rows of one site.

    Attributes:
        site: the site.
        rows: the rows.
        note: how many there are.
        folded: whether a reader opens them first.
    """

    site: str
    rows: Sequence[Example]
    note: str
    folded: bool
    part: str = "examples"


Part = Text | Items | Terms | Table | Chart | Code | Verdicts | Examples


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    name: str  # in the address, such as page.html#scores
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """The page.

    Attributes:
        title: its title.
        lead: one or two sentences below the title.
        facts: the first facts, by name.
        sections: the sections.
        made: when, and by which version.
        banners: warnings at the top.
        refresh: seconds after which a browser asks again; 0: never.
    """

    title: str
    lead: str
    facts: Mapping[str, str]
    sections: Sequence[Section]
    made: str
    banners: Sequence[str] = field(default_factory=tuple)
    refresh: int = 0


def table(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    texts: Sequence[int] = (),
    foot: Sequence[Sequence[str]] = (),
    more: str = "",
    folded: bool = False,
) -> Table:
    """A table of at most :data:`MOST` rows. The first column has words."""
    shown, left = rows[:MOST], max(0, len(rows) - MOST)
    words = frozenset((0, *texts))
    return Table(title, heads, shown, words, foot, left, more, folded)

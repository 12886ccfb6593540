"""Scores by the values of a column of the rows (``eval.group_by``), by client.

They are computed from the answers of a run, which have the value of each row. A deployed run has no
answers at the server, and so no such scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedvlm.engines.base import Answer
from fedvlm.intervals import ends, intervals, scored
from fedvlm.metrics import TAKEN, average

ALL = ""
"""Stands for all clients in the column ``client``."""


def by(key: str, answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """Answers by one of their values, such as ``client``."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer[key], []).append(answer)
    return found


def groups(answers: Sequence[Answer]) -> Iterator[tuple[str, str, list[Answer]]]:
    """(client, value, its answers), all clients together first; values in order.

    Rows without a value are left out.
    """
    for client, own in ((ALL, list(answers)), *by("client", answers).items()):
        by_value = by("group", own)
        for value in sorted(value for value in by_value if value is not None):
            yield client, value, by_value[value]


def rows(column: str, answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """A row for each model, client and value: all scores, and the ends of their 95 % intervals.

    Args:
        column: the name of the column, which becomes a key, or ``value`` where this name is taken.
        answers: model -> its answers.
    """
    key = "value" if column in TAKEN else column
    return [
        {"client": client, key: value, "model": model, **means, **ends(means, intervals(own))}
        for model, found in answers.items()
        for client, value, own in groups(found)
        for means in (average(own),)
    ]


def shown_metrics(main: str, measured: Iterable[str]) -> list[str]:
    """The scores in a table by value: the main one, and those of closed and of open questions.

    Closed questions have few answers and are right or wrong; open ones may be partly right.
    """
    measured = set(measured)
    return [m for m in dict.fromkeys((main, "exact_match", "token_f1")) if m in measured]


def cells(
    metrics: Sequence[str], answers: Sequence[Answer]
) -> Iterator[tuple[str, str, str, list[str]]]:
    """For tables: client, value, number of rows, and each score with its interval."""
    for client, value, own in groups(answers):
        means, bounds = average(own), intervals(own)
        yield client, value, str(len(own)), [scored(m, means[m], bounds.get(m)) for m in metrics]

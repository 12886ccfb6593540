"""Canaries: training rows with wrong answers, for an audit; half of them are trained on.

The rows, the wrong answers and the coins are functions of the run's seed. So a run with canaries is
an experiment: whoever knows the seed knows the coins.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from fedvlm.data.partition import Partition
from fedvlm.errors import DataError, brief
from fedvlm.privacy.plan import FEWEST
from fedvlm.privacy.units import units_of
from fedvlm.seeds import derive
from fedvlm.settings.sections import Config

FILE = "canaries.json"


@dataclass(frozen=True)
class Canary:
    """One canary: a training row, or all training rows of a protected unit.

    Attributes:
        client: the client of the rows.
        trained: whether the canary is in: its rows are trained on. The rows of a canary that is out
            are removed from the training rows.
        rows: positions in the rows of the run.
        numbers: the numbers of these rows in the source.
        answers: the wrong answer of each row.
        rejected: for preferences, the rejected answer of each row, which is the right one.
    """

    client: str
    trained: bool
    rows: tuple[int, ...]
    numbers: tuple[int, ...]
    answers: tuple[str, ...]
    rejected: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Planted(Partition):
    """A partition without the canaries that are out.

    Attributes:
        canaries: all canaries.
    """

    canaries: tuple[Canary, ...] = ()


def planted(rows: Any, partition: Partition, config: Config, pairs: bool) -> tuple[Any, Partition]:
    """The rows with the canaries' wrong answers, and the partition without those that are out.

    Both are unchanged where ``privacy.canaries`` is 0. Held-out rows stay as they are.

    Args:
        rows: the rows of the run.
        partition: their partition.
        config: the settings of the run.
        pairs: whether the run learns preferences.

    Raises:
        DataError: see :func:`drawn`.
    """
    canaries = drawn(rows, partition, config, pairs)
    if not canaries:
        return rows, partition
    for column in ("answer", "rejected") if pairs else ("answer",):
        texts = list(rows[column])
        for one in canaries:
            wrong = one.answers if column == "answer" else one.rejected
            for row, text in zip(one.rows, wrong or (), strict=True):
                texts[row] = text
        rows = rows.remove_columns(column).add_column(column, texts)
    out = [row for one in canaries if not one.trained for row in one.rows]
    splits = {
        client: replace(split, train=split.train[~np.isin(split.train, out)])
        for client, split in partition.splits.items()
    }
    same = {f.name: getattr(partition, f.name) for f in fields(Partition)}
    return rows, Planted(**{**same, "splits": splits}, canaries=canaries)


def drawn(rows: Any, partition: Partition, config: Config, pairs: bool) -> tuple[Canary, ...]:
    """The canaries of a run; none where ``privacy.canaries`` is 0.

    A canary is a protected unit: a training row, or all training rows of a client with one value in
    the column ``privacy.unit``. Each client gets canaries in proportion to its units. A canary's
    wrong answer is another answer of the same client. For preferences, the chosen and the rejected
    answer are swapped.

    Raises:
        DataError: the clients have too few units, or a client has one answer only.
    """
    if not config.privacy.canaries:
        return ()
    column = config.privacy.column
    units = {c: units_of(rows, split.train, column) for c, split in partition.splits.items()}
    counts = spread(config.privacy.canaries, {c: len(own) for c, own in units.items()})
    answers = np.asarray(rows["answer"], object)
    rejected = np.asarray(rows["rejected"], object) if pairs else None
    numbers = np.asarray(rows["row"] if "row" in rows.column_names else range(len(rows)))
    found = []
    for client, count in counts.items():
        draw = np.random.default_rng(derive(config.seed, "canaries", client))
        known = sorted(set(answers[np.concatenate(units[client])]))
        for at in draw.permutation(len(units[client]))[:count]:
            chosen = units[client][at]
            right = tuple(map(str, answers[chosen]))
            if rejected is None:
                wrong = tuple(_another(text, known, client, draw) for text in right)
            else:
                wrong = tuple(map(str, rejected[chosen]))
            found.append(
                Canary(
                    client,
                    bool(draw.random() < 0.5),
                    tuple(map(int, chosen)),
                    tuple(map(int, numbers[chosen])),
                    wrong,
                    right if pairs else None,
                )
            )
    return tuple(found)


def spread(count: int, units: Mapping[str, int]) -> dict[str, int]:
    """Client -> its number of canaries, in proportion to the units that it can give away.

    Raises:
        DataError: the clients together have too few units.
    """
    room = {client: max(0, own - FEWEST) for client, own in units.items()}
    total = sum(room.values())
    if count > total:
        raise DataError(
            f"privacy.canaries={count}: the training rows have room for {total} canaries, because "
            f"{FEWEST} rows or units of each client stay as they are; lower privacy.canaries, or "
            "use more rows"
        )
    exact = {client: count * own / total for client, own in room.items()}
    found = {client: int(share) for client, share in exact.items()}
    rest = sorted(exact, key=lambda client: found[client] - exact[client])  # the largest first
    for client in rest[: count - sum(found.values())]:
        found[client] += 1
    return found


def _another(text: str, known: Sequence[str], client: str, draw: np.random.Generator) -> str:
    """One of the sorted answers, other than ``text``.

    Raises:
        DataError: there is no other.
    """
    if len(known) < 2:
        raise DataError(
            f"privacy.canaries: all training rows of client '{brief(client)}' have the answer "
            f"'{brief(text, 40)}', so a canary has no wrong answer; leave privacy.canaries out"
        )
    at = int(draw.integers(len(known) - 1))
    return known[at + (at >= bisect_left(known, text))]


def of(partition: Partition) -> tuple[Canary, ...]:
    """The canaries of a partition; none where the run has none."""
    return partition.canaries if isinstance(partition, Planted) else ()


def described(partition: Partition) -> dict[str, str]:
    """``canaries.json`` and its content; nothing without canaries."""
    found = [asdict(one) for one in of(partition)]
    text = json.dumps({"canaries": found}, ensure_ascii=False) + "\n"
    return {FILE: text} if found else {}


def warning(canaries: Sequence[Canary]) -> str:
    """The sentence for whoever starts a run with canaries."""
    inside = sum(one.trained for one in canaries)
    return (
        f"privacy.canaries={len(canaries)}: this run is an experiment for 'fedvlm audit'. It "
        f"trains on {inside} canaries, which have wrong answers, and leaves out the other "
        f"{len(canaries) - inside}"
    )

"""Assigns rows to clients: labels or counts go in, one index array for each client comes out.

The parameter ``least`` is the smallest number of rows that a client may have. A function that
cannot give every client so many rows raises ``DataError``.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedvlm.data.labels import codes_of
from fedvlm.errors import DataError, brief
from fedvlm.settings.sections import PartitionConfig

logger = logging.getLogger("fedvlm")

_TRIES = 1000  # most Dirichlet draws to reach min_rows
_DRAWS = 20_000_000  # approximate limit on the random numbers of these draws


def by_column(values: np.ndarray, column: str, least: int) -> dict[str, np.ndarray]:
    """Makes one client for each value, in the natural order of the values."""
    missing = np.array([not value.strip() for value in values])
    if missing.any():
        raise DataError(
            f"{missing.sum()} rows have no value in partition.column '{column}' (the first is "
            f"row {missing.argmax()}): name the client of every row"
        )
    codes, names = codes_of(values)
    _warn_of_twins(names, column)
    parts = by_owner(codes, len(names))
    found = sorted(zip(names, parts, strict=True), key=lambda pair: _natural(pair[0]))
    remedy = "merge these clients, or partition by another column"
    check_sizes(dict(found), least, f"partition.column '{column}'", remedy)
    return dict(found)


def _warn_of_twins(names: list[str], column: str) -> None:
    """Warns of clients whose names look alike. They stay several clients."""
    alike: dict[str, list[str]] = {}
    for name in names:
        seen = unicodedata.normalize("NFC", name).casefold()
        seen = "".join(c for c in seen if unicodedata.category(c) != "Cf")  # zero width
        alike.setdefault(" ".join(seen.split()), []).append(name)
    twins = [group for group in alike.values() if len(group) > 1]
    if twins:
        logger.warning(
            "partition.column '%s': %d names occur in several spellings that differ only in %s, "
            "such as %s; each spelling is a client. Repair the column if that is not meant",
            brief(column, 80),
            len(twins),
            " or ".join(dict.fromkeys(_difference(group) for group in twins)),
            " and ".join(f"{name[:40]!a}" for name in twins[0][:2]),
        )


def _difference(names: list[str]) -> str:
    if len({" ".join(name.split()) for name in names}) == 1:
        return "white space"
    if len({unicodedata.normalize("NFC", name) for name in names}) == 1:
        return "Unicode normalization"
    if len({name.casefold() for name in names}) == 1:
        return "case"
    return "invisible characters, Unicode normalization or case"


def check_sizes(parts: Mapping[str, np.ndarray], least: int, source: str, remedy: str) -> None:
    """Refuses clients with fewer than ``least`` rows.

    Args:
        parts: client -> its rows.
        least: fewest rows of a client.
        source: name of the setting that made the clients.
        remedy: end of the error message, what else the user can do.

    Raises:
        DataError: some clients have fewer rows; the message names the first five.
    """
    small = [f"{name[:60]} ({len(part)})" for name, part in parts.items() if len(part) < least]
    if small:
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        raise DataError(
            f"{len(small)} of {len(parts)} clients of {source} have fewer than {least} rows: "
            f"{', '.join(small[:5])}{more}; lower partition.min_rows (a client needs at least 2), "
            + remedy
        )


def _natural(name: str) -> tuple[list[Any], str]:
    """Sort key that puts site-2 before site-10."""
    pieces = re.split(r"(\d+)", name)
    return [_magnitude(p) if i % 2 else p for i, p in enumerate(pieces)], name


def _magnitude(digits: str) -> tuple[int, str]:
    """Sorts digits of any script and number by their value."""
    plain = digits if digits.isascii() else "".join(str(int(digit)) for digit in digits)
    plain = plain.lstrip("0")
    return len(plain), plain


def dirichlet(
    codes: np.ndarray, settings: PartitionConfig, least: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Divides the rows of each label among the clients by one draw of Dir(alpha).

    The draw is repeated, a bounded number of times, until every client has ``least`` rows.
    """
    clients, totals = settings.clients, np.bincount(codes)
    totals = totals[totals > 0]
    if 2 * len(totals) > len(codes):
        logger.warning(
            "partition.kind=dirichlet: %d of %d labels are distinct, so the clients hardly differ; "
            "set partition.column to a column of classes",
            len(totals),
            len(codes),
        )
    best = -1
    for _ in range(int(np.clip(_DRAWS // (clients * len(totals)), 20, _TRIES))):
        cuts = _cuts(totals, clients, settings.alpha, rng)
        best = max(best, smallest := int(np.diff(cuts, axis=1).sum(axis=0).min()))
        if smallest >= least:
            break
    else:
        raise DataError(
            f"partition.kind=dirichlet with alpha={settings.alpha:g} and {clients} clients left a "
            f"client with {best} rows in the best draw, but partition.min_rows asks for {least}: "
            "raise partition.alpha, or lower partition.clients or partition.min_rows"
        )
    shuffled = rng.permutation(len(codes))
    by_label = shuffled[np.argsort(codes[shuffled], kind="stable")]
    owner = np.repeat(np.tile(np.arange(clients), len(totals)), np.diff(cuts, axis=1).ravel())
    return [by_label[part] for part in by_owner(owner, clients)]


def by_owner(owners: np.ndarray, clients: int) -> list[np.ndarray]:
    """Lists the positions of each client, in order.

    Args:
        owners: the client of each position.
        clients: number of clients.
    """
    order = np.argsort(owners, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owners, minlength=clients))[:-1])


def _cuts(totals: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Bounds of the clients' parts of each label's rows: [labels, clients + 1]."""
    if alpha > 1e6:  # shares are equal up to rounding, and larger values overflow
        shares = np.full((len(totals), clients), 1 / clients)
    else:
        shares = rng.dirichlet(np.full(clients, max(alpha, 1e-6)), size=len(totals))
    inner = np.rint(np.cumsum(shares, axis=1)[:, :-1] * totals[:, None]).astype(np.int64)
    inner = np.clip(inner, 0, totals[:, None])
    return np.column_stack([np.zeros_like(totals), inner, totals])


def shards(
    codes: np.ndarray, settings: PartitionConfig, least: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Cuts the rows, sorted by label, into shards, and deals each client an equal number of them.

    Which client gets which shard is random.
    """
    number = settings.clients * settings.shards
    if number > len(codes):
        raise DataError(
            f"partition.shards={settings.shards} for {settings.clients} clients makes {number} "
            f"shards, but there are {len(codes)} rows: lower partition.shards or partition.clients"
        )
    shuffled = rng.permutation(len(codes))
    shards = np.array_split(shuffled[np.argsort(codes[shuffled], kind="stable")], number)
    dealt = rng.permutation(number).reshape(settings.clients, settings.shards)
    parts = [np.concatenate([shards[s] for s in hand]) for hand in dealt]
    smallest = min(map(len, parts))
    if smallest < least:
        raise DataError(
            f"partition.kind=shards left a client with {smallest} rows, but partition.min_rows "
            f"asks for {least}: lower partition.clients, partition.shards or partition.min_rows"
        )
    return parts


def power_law(count: int, settings: PartitionConfig, least: int) -> np.ndarray:
    """Divides ``count`` into sizes proportional to rank^-exponent, but not below ``least``."""
    weights = np.arange(1, settings.clients + 1, dtype=np.float64) ** -settings.exponent
    sizes = np.full(settings.clients, float(least))
    rest = count - least * np.arange(settings.clients - 1, -1, -1)  # for the first 1, 2, ... ranks
    enough = np.flatnonzero(rest * weights / np.cumsum(weights) >= least)
    free = int(enough[-1]) + 1 if len(enough) else 1  # ranks from `free` on have `least` rows
    sizes[:free] = rest[free - 1] * weights[:free] / weights[:free].sum()
    whole = np.floor(sizes).astype(np.int64)
    largest = np.argsort(-(sizes - whole), kind="stable")
    whole[largest[: count - whole.sum()]] += 1
    return whole

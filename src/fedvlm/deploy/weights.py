"""The server's limits on a run and on the sites' weights.

A site's weight in a mean is its number of training rows. The site reports this number itself, and
nobody else can count the rows. So the server limits the weight: a registered site counts for no
more rows than the operator registered, and any other site for no more than ``max_weight`` times the
median of all sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from fedvlm.settings.method import Positive, Ratio, Section

SPLITS = ("train", "val", "test")
LARGEST = 10**12
"""Rows of one split; no site has more."""


class Limits(Section):
    """The limits of the server: numbers of sites, seconds, bytes of a message, and weights."""

    min_sites: Positive = 1
    at_once: Positive = 16
    held: Positive = 4
    open_s: Positive = 900
    train_s: Positive = 3600
    score_s: Positive = 1800
    max_bytes: Positive = 2**30
    rows: dict[str, Positive] = Field({}, description="site -> its largest weight")
    max_weight: Ratio = Field(
        2.0, description="largest weight of a site that is not in rows, in medians of the sites"
    )


def described(about: Mapping[str, Any]) -> dict[str, Any]:
    """The checked report of a site that has opened a run; other keys are dropped.

    Raises:
        ValueError: the site does not report its adapter, or its numbers of rows are impossible.
    """
    adapter, rows = about["adapter"], about.get("rows")
    if not isinstance(adapter, str):
        raise ValueError("it does not report its initial adapter")
    if rows is None:
        return {"adapter": adapter}
    counts = {split: rows[split] for split in SPLITS}
    if not all(type(n) is int and 0 <= n <= LARGEST for n in counts.values()):
        raise ValueError(f"its numbers of rows are {counts}"[:500])
    if not counts["train"]:
        raise ValueError(f"its numbers of rows are {counts}"[:500])
    return {"adapter": adapter, "rows": counts}


def weighed(
    claimed: Mapping[str, float],
    limits: Limits,
    tell: Callable[[dict[str, Any]], None],
) -> dict[str, float]:
    """The weights of the sites.

    Args:
        claimed: site -> its weight by its own report: rows, or 1.
        limits: the limits of the server.
        tell: called with an event for each site whose weight is less than it claimed.
    """
    registered = limits.rows
    sure = {s: min(w, float(registered.get(s, w))) for s, w in claimed.items()}
    median = sorted(sure.values())[(len(sure) - 1) // 2] if sure else 0.0
    largest = {s: float(registered.get(s, limits.max_weight * median)) for s in claimed}
    weights = {s: min(w, largest[s]) for s, w in claimed.items()}
    for site, weight in weights.items():
        if weight < claimed[site]:
            event = {"event": "capped", "site": site, "claimed": claimed[site], "weight": weight}
            tell({**event, "registered": site in registered})
    return weights

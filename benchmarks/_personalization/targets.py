"""The targets of the default algorithm in the personalization benchmark, and its results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from _personalization import ranks as ranking
from _personalization.pages import Row, Scores, ranked, scores, table
from fedvlm.metrics import mean

DEFAULT = "auto"
GAIN = 1.245  # personal models over lora, as the paper of plora reports
DIFFER = ("label", "concept", "mixed")  # the regimes of target (c)
NEVER_BELOW = ("local", "lora+ft")


def targets(rows: Sequence[Row]) -> str:
    """A table with a line a target, over the cells that compare the default with others."""
    found, worst = scores(rows), scores(rows, "worst10")
    names = ranked(found)
    compared = {
        cell: {a: own for a, own in cell_scores.items() if a in names}
        for cell, cell_scores in found.items()
        if DEFAULT in cell_scores and len(cell_scores) > 1
    }
    if not compared:
        return f"`{DEFAULT}` was not compared yet."
    lines = [
        ("(a) within one standard error of the best in every cell", _best(compared)),
        ("(b) strictly best on average rank", _rank(compared, worst)),
        (f"(c) {GAIN:g} times `lora` in {', '.join(DIFFER)}", _gain(compared)),
        ("(d) never more than one standard error below " + _named(NEVER_BELOW), _below(compared)),
        ("(e) the best worst 10 %", _worst(compared, worst)),
    ]
    return table(("target", f"`{DEFAULT}`"), lines)


def _best(compared: Scores) -> str:
    behind = [
        f"{cell.name} {_lead(own[ranking.best(own)], own[DEFAULT])} (`{ranking.best(own)}`)"
        for cell, own in compared.items()
        if DEFAULT not in ranking.winners(own)
    ]
    return _of(len(compared) - len(behind), len(compared), "behind by", behind)


def _rank(compared: Scores, worst: Scores) -> str:
    first, *others = ranking.overview(compared, worst, ranked(compared)) or [None]
    if first is None:
        return "no cell has all algorithms yet"
    told = [f"`{row.algorithm}` {row.rank:.2f}" for row in (first, *others[:2])]
    best = first.algorithm == DEFAULT and all(row.rank > first.rank for row in others)
    return f"{_yes(best)}: {', '.join(told)}"


def _gain(compared: Scores) -> str:
    some = {c: own for c, own in compared.items() if c.regime in DIFFER and "lora" in own}
    ratios = {
        c: _mean(own[DEFAULT]) / (_mean(own["lora"]) or float("nan")) for c, own in some.items()
    }
    missed = [
        f"{c.name} {ratio:.2f} times (the best of all: {_most(some[c]):.2f})"
        for c, ratio in ratios.items()
        if not ratio >= GAIN
    ]
    reached = [ratio for ratio in ratios.values() if ratio >= GAIN]
    range_ = f", {min(reached):.1f} to {max(reached):.1f} times" if reached else ""
    return _of(len(ratios) - len(missed), len(ratios), "missed in", missed, range_)


def _most(own: Mapping[str, Mapping[int, float]]) -> float:
    return _mean(own[ranking.best(own)]) / _mean(own["lora"])


def _below(compared: Scores) -> str:
    missed = [
        f"{cell.name} {_lead(own[name], own[DEFAULT])} (`{name}`)"
        for cell, own in compared.items()
        for name in NEVER_BELOW
        if name in own and ranking.beats(own[name], own[DEFAULT])
    ]
    pairs = sum(name in own for own in compared.values() for name in NEVER_BELOW)
    return _of(pairs - len(missed), pairs, "below by", missed, kind="comparisons")


def _worst(compared: Scores, worst: Scores) -> str:
    names = {name for own in compared.values() for name in own}
    everywhere = {n for n in names if all(n in own for own in compared.values())}
    means = {n: mean(_mean(worst[c][n]) for c in compared) for n in everywhere}
    order = sorted(means, key=lambda name: -means[name])
    highest = sum(
        _mean(worst[c][DEFAULT]) >= max(_mean(worst[c][n]) for n in own) - ranking.ROUNDING
        for c, own in compared.items()
    )
    told = ", ".join(f"`{name}` {100 * means[name]:.1f}" for name in order[:3])
    return (
        f"on average {_yes(order[0] == DEFAULT)}: {told}; the highest in {highest} of "
        f"{len(compared)} cells"
    )


def _mean(seeds: Mapping[int, float]) -> float:
    return mean(seeds.values())


def _lead(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    ahead, error = ranking.lead(ours, theirs)
    return f"{100 * ahead:.1f}" + (f" ± {100 * error:.1f}" if error else "")


def _of(
    reached: int, all_: int, verb: str, missed: Sequence[str], more: str = "", kind: str = "cells"
) -> str:
    rest = f"; {verb} {', '.join(missed)}" if missed else ""
    return f"{_yes(not missed)}: {reached} of {all_} {kind}{more}{rest}"


def _named(names: Iterable[str]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"

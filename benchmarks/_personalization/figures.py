"""The figures of the personalization benchmark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _personalization import ranks as ranking
from _personalization.bootstrap import Estimate
from _personalization.cells import REFERENCES, Cell
from _personalization.ranks import Pairs
from _personalization.scores import DEFAULT, Row, Scores, gap, ranked, scores, unequal, values
from fedvlm.figures.style import KINDS
from fedvlm.metrics import mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 120
PERSONAL, GLOBAL, UNTUNED = KINDS["personal"], KINDS["global"], KINDS["untuned"]
COLUMNS = 4


def draw(rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
    """Saves both figures as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    heat, dots = folder / "personalization-overview.png", folder / "personalization-cells.png"
    return [overview(rows, heat, title), cells(rows, dots, title)]


def overview(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Algorithms by cells: the mean of the personal models; colour is the distance to the best."""
    from matplotlib.figure import Figure

    found, allowed = scores(rows), ranked(rows)
    names = _order(found, allowed)
    distances = [[behind(found[c], allowed[c], name) for c in found] for name in names]
    size = (3.4 + 0.62 * len(found), 2.4 + 0.3 * len(names))
    figure = Figure(figsize=(max(6.5, size[0]), max(3.6, size[1])), layout="constrained", dpi=DPI)
    figure.suptitle(title, fontsize=11, weight="bold")
    axes = figure.subplots()
    worst = max((v for row in distances for v in row if not math.isnan(v)), default=0.0)
    image = axes.imshow(distances, aspect="auto", cmap="cividis_r", vmin=0, vmax=worst or 1)
    axes.set_facecolor("#E6E6E6")
    for x, cell in enumerate(found):
        best = ranking.winners(allowed[cell])
        for y, name in enumerate(names):
            if name in found[cell]:
                dark = distances[y][x] > 0.5 * worst
                text = f"{100 * mean(found[cell][name].values()):.0f}"
                weight = "bold" if name in best else "normal"
                colour = "white" if dark else "black"
                axes.text(x, y, text, ha="center", va="center", color=colour, weight=weight, size=9)
    axes.set_yticks(range(len(names)), names)
    labels = [cell.name for cell in found]
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Score of personal models, % (bold: best, or tied with it)", fontsize=10)
    figure.colorbar(image, ax=axes, label="points behind the best", format=_points, pad=0.02)
    figure.savefig(path, format="png", dpi=DPI)
    return path


def cells(rows: Sequence[Row], path: Path, title: str) -> Path:
    """A panel a cell: personal and global models, and the worst 10 %.

    The bar of an algorithm is the 95 % interval of its difference to the default algorithm.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    found, odd = scores(rows), unequal(rows)
    worst, shared = values(rows, "worst10"), values(rows, "mean", ("global", "after"))
    start = values(rows, "mean", ("untuned", "start"))
    names = _order(found, ranked(rows))
    wide = min(COLUMNS, len(found))
    tall = math.ceil(len(found) / wide)
    size = (max(7.5, 1.2 + 3.3 * wide), 1.7 + tall * (1.0 + 0.24 * len(names)))
    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    figure.suptitle(title, fontsize=11, weight="bold")
    grid = figure.subplots(tall, wide, squeeze=False, sharey=True)
    for axes, cell in zip(grid.flat, found, strict=False):
        _panel(axes, cell, names, (found, shared, worst), odd[cell])
        _line(axes, start.get(cell, {}))
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    dot: dict[str, Any] = {"marker": "o", "ls": "none"}
    handles = [
        Line2D(
            [],
            [],
            color=PERSONAL,
            label="personal models (bar: interval of the difference to auto)",
            **dot,
        ),
        Line2D([], [], color=PERSONAL, mfc="white", label="their worst 10 %", **dot),
        Line2D([], [], color=GLOBAL, marker="s", ls="none", label="global model"),
        Line2D([], [], color=UNTUNED, ls=":", label="untuned"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, format="png", dpi=DPI)
    return path


def _panel(
    axes: Axes,
    cell: Cell,
    names: Sequence[str],
    kinds: Sequence[Mapping[Cell, Mapping[str, Mapping[Any, float]]]],
    odd: Iterable[str],
) -> None:
    personal, shared, worst = (kind.get(cell, {}) for kind in kinds)
    top = 0.1
    for y, name in enumerate(names):
        marks = ((shared, "s", GLOBAL, GLOBAL), (worst, "o", PERSONAL, "white"))
        for values_, marker, colour, face in (*marks, (personal, "o", PERSONAL, PERSONAL)):
            if own := values_.get(name):
                centre = mean(own.values())
                axes.plot(centre, y, marker=marker, color=colour, mfc=face, ms=5)
                top = max(top, centre)
        lead = gap(personal, odd, name)
        if isinstance(lead, Estimate) and name != DEFAULT:
            base = mean(personal[name].values()) - lead.value
            axes.hlines(y, base + lead.low, base + lead.high, color=PERSONAL, lw=1)
            top = max(top, base + lead.high)
    axes.set_title(cell.name, fontsize=10)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(-0.02, min(1.02, 1.08 * top))
    axes.xaxis.set_major_formatter(_percents)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Axes, start: Mapping[str, Mapping[int, float]]) -> None:
    untuned = [v for a, own in start.items() if a not in REFERENCES for v in own.values()]
    if untuned:
        axes.axvline(mean(untuned), color=UNTUNED, ls=":")


def _order(found: Scores, ranked: Scores) -> list[str]:
    """The algorithms by their average distance to the best, the smallest first."""
    names = dict.fromkeys(name for cell in found.values() for name in cell)

    def distance(name: str) -> float:
        apart = [behind(own, ranked[c], name) for c, own in found.items()]
        some = [points for points in apart if not math.isnan(points)]
        return mean(some) if some else math.inf

    return sorted(names, key=distance)


def behind(own: Mapping[str, Pairs], ranked: Mapping[str, Pairs], name: str) -> float:
    """The distance of an algorithm's mean to the mean of the best ranked algorithm of a cell.

    NaN for an algorithm without a run, and for one of unequal steps.
    """
    some = ranked or own
    if name not in own or (name not in ranked and name not in REFERENCES):
        return math.nan
    best = mean(some[ranking.best(some)].values())
    return max(0.0, best - mean(own[name].values()))


def _points(value: float, _: Any) -> str:
    return f"{100 * value:.0f}"


def _percents(value: float, _: Any) -> str:
    return f"{100 * value:.0f} %"

"""The style of all figures: colours, markers, axes, legends, and the saved file.

The colours are those of Okabe and Ito. Colour-blind readers can tell them apart. The functions use
no global state of pyplot, and they import matplotlib on their first call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

DPI = 150
GREY, MISSING = "#8C8C8C", "#E6E6E6"  # values without a model; cells without a value
KINDS = {"untuned": GREY, "global": "#E69F00", "personal": "#0072B2"}
SPLITS = {"train": "#0072B2", "val": "#56B4E9", "test": "#E69F00"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":")
HEAT = "cividis"  # colour map of heat maps
LONGEST = 24  # characters of a name


def new_figure(title: str, size: tuple[float, float]) -> Figure:
    """An empty figure with a title.

    Args:
        title: title of the figure.
        size: width and height in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    figure.suptitle(title, fontsize=13, weight="bold")
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Saves a figure as a PNG, in a folder that is created where needed; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI)
    return path


def line(index: int) -> dict[str, Any]:
    """Colour, marker and line style of the curve with this number."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "ls": LINES[index // len(COLOURS) % len(LINES)],
    }


def percent() -> Formatter:
    """A formatter that writes shares as whole percentages."""
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0)


def short(name: str) -> str:
    """A name of at most 24 characters. A longer name loses its middle."""
    return name if len(name) <= LONGEST else f"{name[:9]}…{name[-14:]}"


def score_axis(axis: Axis, top: float) -> None:
    """Formats an axis of scores: percentages from zero to a round number above ``top``."""
    from matplotlib.ticker import MaxNLocator

    axes, vertical = axis.axes, axis is axis.axes.yaxis
    axis.set_major_formatter(percent())
    axis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
    high = min(1.0, math.ceil(10 * max(top, 0.1) + 0.3) / 10)
    (axes.set_ylim if vertical else axes.set_xlim)(-0.02 * high, 1.03 * high)
    light_grid(axis)
    axes.spines[["top", "right"]].set_visible(False)


def light_grid(axis: Axis) -> None:
    """Draws a light grid at the ticks of an axis, behind the data."""
    axes = axis.axes
    axes.grid(axis="y" if axis is axes.yaxis else "x", alpha=0.25)
    axes.set_axisbelow(True)


def round_axis(axes: Axes) -> None:
    """Formats the x axis for rounds. Axes without a curve get a note."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round (0: untuned model)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if not axes.lines:
        axes.text(0.5, 0.5, "not evaluated", transform=axes.transAxes, ha="center")


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Writes names below the x axis, slanted where they would overlap."""
    shown = [short(name) for name in names]
    crowded = max(map(len, shown), default=0) * len(shown) > 60
    axes.set_xticks(range(len(names)), shown, **(slanted() if crowded else {}))


def slanted() -> dict[str, Any]:
    """Options of slanted tick labels."""
    return {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}


def bare(axes: Axes) -> None:
    """Hides tick marks and frame, for a heat map."""
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def legend_below(axes: Axes, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    """Draws a legend below the axes, with at most this number of columns."""
    axes.legend(
        handles,
        labels,
        fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.47, -0.15),
        ncols=min(columns, max(1, len(labels))),
        handlelength=2.8,
        frameon=False,
    )

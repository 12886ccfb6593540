"""The style of all figures: colours, markers, axes, legends, and the saved file.

The colours are those of Okabe and Ito. Colour-blind readers can tell them apart. The functions use
no global state of pyplot, and they import matplotlib on their first call.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
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
LONGEST, TITLE = 24, 100  # characters of a name, and of a title


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """Draws every text as it is: ``$``, ``_`` and ``\\`` have no meaning of their own.

    The texts of a figure are created while it is built, and some of them while it is saved. So both
    happen in this context, which also decorates functions.
    """
    import matplotlib

    settings: Any = {
        "text.parse_math": False,
        "text.usetex": False,
        "axes.formatter.use_mathtext": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # names may be of any script
        yield


def new_figure(title: str, size: tuple[float, float]) -> Figure:
    """An empty figure with a title.

    Args:
        title: title of the figure.
        size: width and height in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    figure.suptitle(text(title, TITLE), fontsize=13, weight="bold")
    return figure


@plain_text()
def save(figure: Figure, path: str | Path) -> Path:
    """Saves a figure as a PNG, atomically, in a folder that is created where needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(part, format="png", dpi=DPI)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
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


def text(name: str, most: int = LONGEST) -> str:
    """A name as one line of printable characters. A longer name than ``most`` loses its middle."""
    line = " ".join(name[: 100 * most].split()) + name[100 * most :][-most:]
    shown = "".join(c if c.isprintable() or c == " " else "\ufffd" for c in line)
    return (
        shown if len(shown) <= most else f"{shown[: 3 * most // 8]}…{shown[-(5 * most // 8 - 1) :]}"
    )


def label(name: str) -> str:
    """A name for a legend. Legends leave out names that begin with ``_``, so a space precedes."""
    shown = text(name)
    return f" {shown}" if shown.startswith("_") else shown


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
    shown = [text(name) for name in names]
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

"""The figures of the inversion benchmark."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fedvlm.figures import style

SIDE = 1.55  # inches of a picture
DPI = 80


@style.plain_text()
def grid(columns: Mapping[str, Tensor], labels: Sequence[str], path: Path, title: str) -> Path:
    """Saves pictures side by side.

    Args:
        columns: title -> pictures ``[rows, 3, side, side]`` in -1 to 1.
        labels: the texts of each row, at its left.
        path: the PNG.
        title: of the figure.
    """
    size = SIDE * (len(columns) + 1), SIDE * len(labels) + 0.9
    figure = style.new_figure(title, size)
    axes = figure.subplots(len(labels), len(columns), squeeze=False)
    for column, (name, shown) in enumerate(columns.items()):
        for row, picture in enumerate(shown):
            one = axes[row, column]
            one.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
            one.set_xticks([])
            one.set_yticks([])
            if not row:
                one.set_title("\n".join(textwrap.wrap(name, 18)), fontsize=9)
            if not column:
                text = "\n".join(textwrap.fill(line, 18) for line in labels[row].split("\n"))
                one.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    return _save(figure, path)


@style.plain_text()
def bars(shares: Mapping[str, float], chance: float, path: Path, title: str) -> Path:
    """Saves shares as bars, with a line at the share of a guess.

    Args:
        shares: name -> share.
        chance: the share that a guess reaches.
        path: the PNG.
        title: of the figure.
    """
    figure = style.new_figure(title, (7.2, 0.9 + 0.38 * len(shares)))
    axes, names = figure.subplots(), list(shares)
    axes.barh(range(len(names)), list(shares.values()), color=style.COLOURS[0])
    axes.axvline(chance, color=style.COLOURS[1], ls="--", label=f"a guess: {chance:.0%}")
    for place, name in enumerate(names):
        axes.text(shares[name] + 0.01, place, f"{shares[name]:.0%}", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), [style.text(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1)
    axes.xaxis.set_major_formatter(style.percent())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    return _save(figure, path)


def _save(figure: object, path: Path) -> Path:
    """Saves a figure as a small PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI)  # type: ignore[attr-defined]
    return path

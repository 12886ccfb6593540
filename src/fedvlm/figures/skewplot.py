"""The plot of a partition: rows, labels and divergence of each client."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedvlm.data.partition import SPLITS, Partition
from fedvlm.figures import style
from fedvlm.figures.series import capital

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_SHOWN = 100  # clients
MOST_WRITTEN = 30  # clients; a heat map of more clients has no numbers in its cells


def plot_partition(partition: Partition, path: str | Path) -> Path:
    """Saves :func:`figure_partition` as a PNG and returns its path."""
    return style.save(figure_partition(partition), path)


@style.plain_text()
def figure_partition(partition: Partition) -> Figure:
    """A row for each client: its rows by split, the shares of its labels, its divergence.

    The labels are :attr:`Partition.frequent`. The column "all others" holds the other labels.
    Colours follow the square root of the share, from 0 to 100 % in every figure, so rare labels
    are visible and figures are comparable. With more than a hundred clients the figure shows the
    first hundred.

    Args:
        partition: a result of :func:`fedvlm.data.partition.make_partition`.
    """
    clients = partition.clients[:MOST_SHOWN]
    few = len(clients) <= MOST_WRITTEN
    height = len(clients) * (0.3 if few else 0.13)
    widths = [3.4, max(3.4, 0.6 * len(partition.frequent)), 2.4]
    figure = style.new_figure(_title(partition), size=(sum(widths) + 1.8, max(1.2, height) + 2.6))
    sizes, labels, divergence = figure.subplots(1, 3, sharey=True, width_ratios=widths)
    _draw_sizes(sizes, partition, clients)
    _draw_labels(labels, partition, clients, written=few)
    _draw_divergence(divergence, partition, clients)
    sizes.set_yticks(
        range(len(clients)), [style.text(c) for c in clients], fontsize=9 if few else 6
    )
    sizes.set_ylim(len(clients) - 0.4, -0.6)
    return figure


def _title(partition: Partition) -> str:
    count, rows = len(partition.clients), sum(map(len, partition.splits.values()))
    shown = f" (the first {MOST_SHOWN} are shown)" if count > MOST_SHOWN else ""
    return f"{count} clients{shown}, {rows} rows, partition: {partition.kind}"


def _draw_sizes(axes: Axes, partition: Partition, clients: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    left = np.zeros(len(clients))
    for split in SPLITS:
        counts = [len(getattr(partition.splits[client], split)) for client in clients]
        axes.barh(range(len(clients)), counts, left=left, color=style.SPLITS[split], label=split)
        left += counts
    axes.set_title("Rows", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        borderaxespad=2.4,
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    _bars_only(axes)


def _draw_labels(
    axes: Axes, partition: Partition, clients: Sequence[str], *, written: bool
) -> None:
    """Draws the shares of the labels within each client: [clients, labels and all others]."""
    from matplotlib.colors import PowerNorm

    axes.set_title(
        f"{capital(style.text(partition.label))}: share within a client, in %", fontsize=11
    )
    style.bare(axes)
    if not partition.frequent:
        axes.set_xticks([])
        axes.text(
            0.5,
            0.5,
            f"no {style.text(partition.label)} occurs twice",
            transform=axes.transAxes,
            ha="center",
        )
        return
    totals = np.array([[len(partition.splits[client])] for client in clients])
    counts = np.array([partition.skew[client].counts for client in clients])
    shares = np.column_stack([counts, totals - counts.sum(axis=1, keepdims=True)]) / totals
    names = [style.text(label) for label in partition.frequent] + ["all others"]
    if not shares[:, -1].any():
        shares, names = shares[:, :-1], names[:-1]
    axes.imshow(shares, aspect="auto", cmap=style.HEAT, norm=PowerNorm(0.5, 0.0, 1.0))
    if written:
        for row, column in np.argwhere(shares):
            colour = "white" if shares[row, column] <= 0.35 else "black"
            text = f"{100 * shares[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(names)), names, **style.slanted(), fontsize=9)
    if not written:
        axes.figure.colorbar(
            axes.images[0], ax=axes, format=style.percent(), pad=0.02, fraction=0.03, aspect=60
        )


def _draw_divergence(axes: Axes, partition: Partition, clients: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    values = [partition.skew[client].divergence for client in clients]
    axes.barh(range(len(clients)), values, color=style.GREY)
    axes.axvline(partition.mean_divergence(), color="black", ls=":", lw=1)
    axes.set_title(f"Divergence, mean {partition.mean_divergence():.2f}", fontsize=11)
    axes.set_xlabel("Jensen-Shannon; 0: as all rows", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlim(0, max(0.1, 1.05 * max(values)))
    _bars_only(axes)


def _bars_only(axes: Axes) -> None:
    style.light_grid(axes.xaxis)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)

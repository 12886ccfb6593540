"""Plots of one run and of a comparison of algorithms, drawn from the lines of ``metrics.jsonl``.

``figure_*`` return a matplotlib ``Figure``. ``plot_*`` save the figure as a PNG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm.errors import FedVLMError
from fedvlm.figures import style
from fedvlm.figures.series import (
    Line,
    Scores,
    capital,
    client_names,
    curve,
    end_scores,
    first_scores,
    last_round,
    last_scores,
    mean_scores,
    metric_name,
    seed_curves,
    worst_tenth,
)
from fedvlm.metrics import mean, standard_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 20  # more clients become sorted curves without names


def plot_run(lines: Sequence[Line], path: str | Path, title: str, **options: Any) -> Path:
    """Saves :func:`figure_run` as a PNG and returns its path."""
    return style.save(figure_run(lines, title, **options), path)


def plot_comparison(
    results: Mapping[str, Sequence[Sequence[Line]]], path: str | Path, title: str, **options: Any
) -> Path:
    """Saves :func:`figure_comparison` as a PNG and returns its path."""
    return style.save(figure_comparison(results, title, **options), path)


@style.plain_text()
def figure_run(lines: Sequence[Line], title: str, metric: str = "exact_match") -> Figure:
    """One run: the mean over clients by round, and every client's score at the end.

    The mean of a round is over the clients evaluated in that round. A client that missed the last
    evaluation has its latest score as the score at the end.

    Args:
        lines: metrics of the run, one line a round; round 0 is the untuned model.
        title: title of the figure.
        metric: a metric that is a share, such as ``exact_match``.
    """
    figure = style.new_figure(title, size=(11.0, 4.6))
    curves, clients = figure.subplots(1, 2, width_ratios=[1.0, 1.35])
    name = metric_name(metric)
    _draw_run_curves(curves, lines, metric)
    ends = {
        "untuned": first_scores(lines, metric),
        "global": last_scores(lines, "global", metric),
        "personal": last_scores(lines, "personal", metric),
    }
    ends = {kind: scores for kind, scores in ends.items() if scores}
    _draw_clients(clients, ends, name)
    _run_legend(figure, list(ends), len(client_names(ends.values())))
    return figure


@style.plain_text()
def figure_comparison(
    results: Mapping[str, Sequence[Sequence[Line]]], title: str, metric: str = "exact_match"
) -> Figure:
    """Several algorithms: curves of the personal models, a summary of the end, and every client.

    Bands and bars are one standard error over seeds. With one seed there are none.

    Args:
        results: algorithm -> one list of metrics lines for each seed.
        title: title of the figure.
        metric: a metric that is a share, such as ``exact_match``.

    Raises:
        FedVLMError: no run was evaluated.
    """
    name = metric_name(metric)
    ends = {a: [end_scores(lines, metric) for lines in runs] for a, runs in results.items()}
    starts = [first_scores(lines, metric) for runs in results.values() for lines in runs]
    per_client = {"untuned": mean_scores(starts)}
    per_client |= {a: mean_scores(seeds) for a, seeds in ends.items()}
    per_client = {a: scores for a, scores in per_client.items() if scores}

    if not per_client:
        raise FedVLMError(f"nothing to compare: no run was evaluated ({name})")

    rows = len(per_client)
    named = len(client_names(per_client.values())) <= MOST_NAMED
    bottom = max(2.0, 0.36 * rows + 1.0) if named else 3.4
    top = max(4.6, 0.36 * rows + 1.4)
    figure = style.new_figure(title, size=(11.0, top + bottom))
    grid = figure.add_gridspec(2, 1, height_ratios=[top, bottom])
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    curves, summary = above.subplots(1, 2, width_ratios=[1.25, 1.0])
    styles = {a: style.line(i) for i, a in enumerate(results)}
    _draw_comparison_curves(curves, results, styles, metric)
    _draw_summary(summary, results, ends, per_client.get("untuned", {}), styles, metric)
    clients = below.subplots()
    if named:
        _draw_heat_map(clients, per_client, name)
    else:
        _draw_sorted(
            clients, per_client, {"untuned": {"color": style.KINDS["untuned"]}} | styles, name
        )
        clients.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    return figure


def _draw_run_curves(axes: Axes, lines: Sequence[Line], metric: str) -> None:
    top = 0.0
    for kind, marker in (("global", "s"), ("personal", "o")):
        points = curve(lines, kind, metric)
        if not points:
            continue
        rounds, colour = list(points), style.KINDS[kind]
        means = [mean(scores.values()) for scores in points.values()]
        axes.plot(rounds, means, marker=marker, ms=5, lw=2, color=colour, label=f"{kind}: mean")
        top = max(top, *means)
        if max(map(len, points.values())) > 1:
            worst = [worst_tenth(scores) for scores in points.values()]
            label = f"{kind}: worst"
            axes.plot(rounds, worst, lw=1, ls="--", color=colour, label=label)
    axes.set_title(f"Mean {metric_name(metric)} over clients, by round")
    style.score_axis(axes.yaxis, top)
    axes.set_ylabel(metric_name(metric))
    style.round_axis(axes)


def _draw_clients(axes: Axes, ends: Mapping[str, Scores], name: str) -> None:
    names = client_names(ends.values())
    if len(names) > MOST_NAMED:
        return _draw_sorted(axes, ends, {k: {"color": style.KINDS[k]} for k in ends}, name)
    width = 0.8 / max(1, len(ends))
    for i, (kind, scores) in enumerate(ends.items()):
        shift = (i - (len(ends) - 1) / 2) * width
        at = [x + shift for x, client in enumerate(names) if client in scores]
        heights = [scores[client] for client in names if client in scores]
        axes.bar(at, heights, width, color=style.KINDS[kind], label=kind)
    axes.set_title(f"{capital(name)} of every client at the end")
    margin = 0.6 + max(0, 3 - len(names)) / 2
    axes.set_xlim(-margin, len(names) - 1 + margin)
    style.name_ticks(axes, names)
    style.score_axis(axes.yaxis, max((v for s in ends.values() for v in s.values()), default=0.0))
    return None


def _draw_sorted(
    axes: Axes, ends: Mapping[str, Scores], styles: Mapping[str, Mapping[str, Any]], name: str
) -> None:
    """Draws the scores of each model from the worst client to the best, for many clients."""
    for label, scores in ends.items():
        values = sorted(scores.values())
        at = [(i + 0.5) / len(values) for i in range(len(values))]
        colour = styles[label]["color"]
        axes.plot(at, values, drawstyle="steps-mid", lw=1.8, color=colour, label=style.label(label))
    count = len(client_names(ends.values()))
    axes.set_title(f"{capital(name)} at the end, {count} clients sorted from worst to best")
    axes.set_xlabel("share of clients at or below")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(style.percent())
    style.score_axis(axes.yaxis, max((v for s in ends.values() for v in s.values()), default=0.0))
    axes.set_ylabel(name)


def _draw_comparison_curves(
    axes: Axes,
    results: Mapping[str, Sequence[Sequence[Line]]],
    styles: Mapping[str, Mapping[str, Any]],
    metric: str,
) -> None:
    top = 0.0
    for algorithm, runs in results.items():
        rounds, seeds = seed_curves(runs, metric)
        if not rounds:
            continue
        means = [mean(values) for values in seeds]
        axes.plot(rounds, means, ms=5, lw=2, label=style.label(algorithm), **styles[algorithm])
        top = max(top, *means)
        if min(map(len, seeds)) > 1:
            errors = [standard_error(values) for values in seeds]
            low = [m - e for m, e in zip(means, errors, strict=True)]
            high = [m + e for m, e in zip(means, errors, strict=True)]
            axes.fill_between(rounds, low, high, color=styles[algorithm]["color"], alpha=0.15, lw=0)
            top = max(top, *high)
    axes.set_title(f"Personal model: mean {metric_name(metric)}, by round")
    style.score_axis(axes.yaxis, top)
    axes.set_ylabel(metric_name(metric))
    style.round_axis(axes)
    columns = max(2, 60 // (max(map(len, results)) + 5))
    style.legend_below(axes, *axes.get_legend_handles_labels(), columns)


def _draw_summary(
    axes: Axes,
    results: Mapping[str, Sequence[Sequence[Line]]],
    ends: Mapping[str, Sequence[Scores]],
    untuned: Scores,
    styles: Mapping[str, Mapping[str, Any]],
    metric: str,
) -> None:
    """Draws a row an algorithm: mean and standard error over all clients, and the worst 10 %."""
    last = {a: max((last_round(r, metric) for r in runs), default=0) for a, runs in results.items()}
    one = len(set(last.values())) == 1
    labels = [style.text(a) + ("" if one else f"\n(round {last[a]})") for a in ends]
    top = 0.0
    for row, (algorithm, seeds) in enumerate(ends.items()):
        seeds = [scores for scores in seeds if scores]
        if not seeds:
            continue
        colour, marker = styles[algorithm]["color"], styles[algorithm]["marker"]
        means = [mean(scores.values()) for scores in seeds]
        worst = [worst_tenth(scores) for scores in seeds]
        error = standard_error(means) if len(means) > 1 else None
        worst_error = standard_error(worst) if len(worst) > 1 else None
        axes.plot([mean(worst), mean(means)], [row, row], color=colour, lw=1, alpha=0.5)
        dot: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "ls": "none",
            "capsize": 4,
        }
        axes.errorbar(mean(means), row, xerr=error, ms=8, **dot)
        axes.errorbar(mean(worst), row, xerr=worst_error, ms=7, mfc="white", **dot)
        axes.annotate(
            f"{mean(means):.1%}",
            (mean(means), row),
            (0, 9),
            fontsize=9,
            textcoords="offset points",
            ha="center",
        )
        top = max(top, mean(means) + (error or 0.0))
    if untuned:
        axes.axvline(
            mean(untuned.values()), color=style.KINDS["untuned"], ls=":", label="untuned, mean"
        )
    _summary_legend(axes, max((len(s) for seeds in ends.values() for s in seeds), default=0))
    seeds_count = sorted({len(runs) for runs in results.values()})
    over = (
        "one seed"
        if seeds_count == [1]
        else (f"± standard error over {'-'.join(map(str, seeds_count))} seeds")
    )
    axes.set_title(f"At the end ({over})")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.7)
    style.score_axis(axes.xaxis, top)
    axes.set_xlabel(metric_name(metric))


def _draw_heat_map(axes: Axes, per_client: Mapping[str, Scores], name: str) -> None:
    """Draws algorithms by clients, and frames the best trained algorithm of each client."""
    from matplotlib.patches import Rectangle

    rows, clients = list(per_client), client_names(per_client.values())
    cells = [[per_client[row].get(client, math.nan) for client in clients] for row in rows]
    known = [v for row in cells for v in row if not math.isnan(v)]
    image = axes.imshow(cells, aspect="auto", cmap=style.HEAT, vmin=0.0, vmax=max(known) or 1.0)
    axes.set_facecolor(style.MISSING)
    for column in range(len(clients)):
        values = [row[column] for row in cells]
        trained = [v for row, v in zip(rows, values, strict=True) if row != "untuned" and v == v]
        for row, value in enumerate(values):
            dark = value <= 0.55 * max(known)
            text = "–" if math.isnan(value) else f"{100 * value:.0f}"
            colour = "white" if dark else "black"
            best = rows[row] != "untuned" and bool(trained) and value == max(trained)
            weight = "bold" if best else "normal"
            axes.text(column, row, text, ha="center", va="center", color=colour, weight=weight)
            if best and len(trained) > 1:
                frame = Rectangle((column - 0.46, row - 0.43), 0.92, 0.86, fill=False, ec=colour)
                axes.add_patch(frame)
    axes.set_title(f"{capital(name)} of every client at the end, in % (framed: the client's best)")
    axes.set_yticks(range(len(rows)), [style.text(row) for row in rows])
    style.bare(axes)
    style.name_ticks(axes, clients)
    axes.figure.colorbar(image, ax=axes, format=style.percent(), pad=0.01)


def _run_legend(figure: Figure, kinds: Sequence[str], clients: int) -> None:
    """Draws one legend for both panels: colours name the model, lines name the clients."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=style.KINDS[kind], label=f"{kind} model") for kind in kinds]
    handles.append(Line2D([], [], color="black", marker="o", lw=2, label="mean over clients"))
    if clients > 1:
        handles.append(Line2D([], [], color="black", lw=1, ls="--", label=_worst_name(clients)))
    if kinds:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False
        )


def _summary_legend(axes: Axes, clients: int) -> None:
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    dot: dict[str, Any] = {"color": "black", "marker": "o", "ls": "none"}
    dots = [Line2D([], [], mfc=face, **dot) for face in ("black", "white")]
    labels = ["mean over clients", _worst_name(clients), *labels]
    style.legend_below(axes, [*dots, *handles], labels, 3)


def _worst_name(clients: int) -> str:
    return "worst 10 % of clients" if clients >= 20 else "worst client"

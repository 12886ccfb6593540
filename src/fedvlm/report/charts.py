"""The charts of a page as specifications of Vega-Lite.

Fields have fixed names, such as ``site`` and ``value``. Names of sites and of algorithms are values
of the data and never names of fields or parts of an expression. Colours are variables of the page's
style sheet, so that a chart follows the page into the dark and onto paper. Each series has a shape
or a dash of its own next to its colour.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedvlm.errors import brief
from fedvlm.report.parts import Key

BESIDE = "The table has the same numbers."  # a note below a chart
KINDS = {"untuned": 0, "global": 2, "personal": 1}
"""The models' places among the colours. A colour is ``--c0``, ``--c1``, ... of the style sheet."""
COLOURS = 8
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
GLYPHS = ("●", "■", "▲", "◆", "✚", "▼")
DASHES: tuple[list[int], ...] = ([2, 2], [1, 0], [6, 3], [8, 3, 2, 3])
MOST, LINES = 40, 200  # sites of a chart, and lines of all sites
LONGEST = 28  # characters of a name
Values = Sequence[Mapping[str, Any]]


def _data(values: Values) -> dict[str, Any]:
    """The data of a chart. JSON has no infinite numbers, so they are left out."""

    def kept(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {"values": [{key: kept(value) for key, value in one.items()} for one in values]}


def _spec(height: Any, **parts: Any) -> dict[str, Any]:
    line, text, soft = "var(--line)", "var(--ink)", "var(--soft)"
    return {
        "width": "container",
        "height": height,
        "background": None,
        "config": {
            "font": "system-ui, sans-serif",
            "view": {"stroke": None},
            "axis": {
                "labelColor": text,
                "titleColor": soft,
                "gridColor": line,
                "domainColor": line,
                "tickColor": line,
                "labelFontSize": 13,
                "titleFontSize": 13,
                "titleFontWeight": "normal",
                "labelLimit": 190,
            },
        },
        **parts,
    }


def _places(names: Sequence[str], kinds: bool) -> list[int]:
    """The place of each series among colours, shapes and dashes."""
    return [KINDS[name] if kinds else 1 + i for i, name in enumerate(names)]


def _one_of(things: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [things[place % len(things)] for place in places]


def _colours(places: Sequence[int]) -> list[str]:
    return [f"var(--c{place % COLOURS})" for place in places]


def keys(names: Sequence[str], *, kinds: bool = False) -> list[Key]:
    """The legend of some series, as :func:`scores` and :func:`curves` draw them."""
    places = _places(names, kinds)
    glyphs = _one_of(GLYPHS, places)
    parts = zip(names, glyphs, places, strict=True)
    return [Key(brief(name, 40), glyph, f"--c{place % COLOURS}") for name, glyph, place in parts]


def bar_keys(names: Sequence[str]) -> list[Key]:
    """The legend of :func:`bars`."""
    return [Key(name, "■", f"--b{i}") for i, name in enumerate(names)]


def _score(name: str, share: bool) -> dict[str, Any]:
    """The axis of a score."""
    axis: dict[str, Any] = {"format": ".0%"} if share else {}
    return {
        "field": "value",
        "type": "quantitative",
        "axis": {"title": name, "tickCount": 6, **axis},
    }


def _sites(sort: Any = None) -> dict[str, Any]:
    axis = {"title": None, "domain": False, "ticks": False, "labelPadding": 8}
    return {"field": "site", "type": "nominal", "sort": sort, "axis": axis}


def _room(series: int) -> int:
    """The most sites of a chart that has a line for each of some series."""
    return max(4, min(MOST, LINES // series))


def labels(sites: Sequence[str], series: int = 1) -> dict[str, str]:
    """The sites of a chart -> short names, each another one.

    Args:
        sites: all sites.
        series: the number of lines of a site.
    """
    found: dict[str, str] = {}
    for site in sites[: _room(series)]:
        short = brief(site, LONGEST)
        tries = (short if n == 1 else f"{short} ({n})" for n in itertools.count(1))
        found[site] = next(name for name in tries if name not in found.values())
    return found


def rest(sites: Sequence[str], series: int = 1) -> str:
    """A sentence on the sites that a chart leaves out; arguments as of :func:`labels`."""
    room = _room(series)
    left = len(sites) - room
    return f" The chart has the first {room} sites, and {left:,} are left out." * (left > 0)


def scores(
    values: Values, models: Sequence[str], metric: str, share: bool, *, kinds: bool
) -> dict[str, Any]:
    """The scores of all sites and models, with their intervals.

    Args:
        values: ``site``, ``model``, ``value``, and ``low`` and ``high`` where they are known.
        models: the models, in order.
        metric: the name of the score.
        share: whether the score is a share.
        kinds: whether the models are ``untuned``, ``global`` and ``personal``.
    """
    places = _places(models, kinds)
    x = _score(metric, share)
    if share:
        x["scale"] = {"domain": [0, 1]}
    y = _sites()
    offset = {"field": "model", "type": "nominal", "sort": list(models)}
    colour = {
        "field": "model",
        "type": "nominal",
        "sort": list(models),
        "scale": {"domain": list(models), "range": _colours(places)},
        "legend": None,
    }
    shape = {**colour, "scale": {"domain": list(models), "range": _one_of(SHAPES, places)}}
    place = {"y": y, "yOffset": offset, "color": colour}
    rule = {**place, "x": {**x, "field": "low"}, "x2": {"field": "high"}}
    return _spec(
        {"step": 17, "for": "offset"},
        data=_data(values),
        layer=[
            {"mark": {"type": "rule", "strokeWidth": 2, "aria": False}, "encoding": rule},
            {
                "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
                "encoding": {**place, "x": x, "shape": shape},
            },
        ],
    )


def curves(
    values: Values,
    series: Sequence[str],
    axis: str,
    share: bool,
    *,
    kinds: bool = False,
    limit: float | None = None,
) -> dict[str, Any]:
    """Lines over the rounds.

    Args:
        values: ``round``, ``series`` and ``value``.
        series: the names of the lines, in order.
        axis: the name of the values.
        share: whether a value is a share.
        kinds: whether the lines are ``global`` and ``personal``.
        limit: a value that is marked by a horizontal line, such as a budget.
    """
    places = _places(series, kinds)
    last = max((v["round"] for v in values), default=1)
    x = {
        "field": "round",
        "type": "quantitative",
        "axis": {
            "title": "round",
            "tickMinStep": 1,
            "format": "d",
            "grid": False,
            "tickCount": min(10, last + 1),
        },
        "scale": {"domain": [0, last], "nice": False},
    }
    y = _score(axis, share) | {"scale": {"zero": True}}

    def by(range_: Any) -> dict[str, Any]:
        scale = {"domain": list(series), "range": range_}
        return {"field": "series", "type": "nominal", "scale": scale, "legend": None}

    lines: list[dict[str, Any]] = [
        {
            "mark": {"type": "line", "strokeWidth": 2.5, "aria": False},
            "encoding": {
                "x": x,
                "y": y,
                "color": by(_colours(places)),
                "strokeDash": by(_one_of(DASHES, places)),
            },
        },
        {
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
            "encoding": {
                "x": x,
                "y": y,
                "color": by(_colours(places)),
                "shape": by(_one_of(SHAPES, places)),
            },
        },
    ]
    if limit is not None:
        rule = {"type": "rule", "color": "var(--soft)", "strokeDash": [4, 4]}
        lines.append({"mark": rule, "encoding": {"y": {"datum": limit}}})
    return _spec(240, data=_data(values), layer=lines)


def bars(
    values: Values, kinds: Sequence[str], axis: str, *, unit: str = "", beside: bool = False
) -> dict[str, Any]:
    """Bars of each site.

    Args:
        values: ``site``, ``series`` and ``value``.
        kinds: the series, in order.
        axis: the name of the values.
        unit: a format of d3, such as ``~s``.
        beside: whether the bars of a site lie beside one another. Else they are stacked.
    """
    colour = {
        "field": "series",
        "type": "nominal",
        "sort": list(kinds),
        "scale": {
            "domain": list(kinds),
            "range": [f"var(--b{i})" for i in range(len(kinds))],
        },
        "legend": None,
    }
    x = {
        "field": "value",
        "type": "quantitative",
        "stack": None if beside else "zero",
        "axis": {"title": axis, "tickCount": 6, **({"format": unit} if unit else {})},
    }
    order = {"field": "order", "type": "quantitative"}
    numbered = [{**v, "order": list(kinds).index(v["series"])} for v in values]
    mark = {"type": "bar", "height": 10 if beside else 15}
    encoding = {"x": x, "y": _sites(), "color": colour}
    if beside:
        encoding["yOffset"] = {"field": "series", "type": "nominal", "sort": list(kinds)}
    else:
        encoding["order"] = order
    height = {"step": 13, "for": "offset"} if beside else {"step": 26}
    return _spec(height, data=_data(numbered), mark=mark, encoding=encoding)


def shares(values: Values, labels: Sequence[str]) -> dict[str, Any]:
    """The shares of labels within sites, as squares that are darker for larger shares.

    Args:
        values: ``site``, ``label`` and ``value``.
        labels: the labels, in order.
    """
    x = {
        "field": "label",
        "type": "nominal",
        "sort": list(labels),
        "axis": {
            "title": None,
            "orient": "top",
            "labelAngle": -40,
            "domain": False,
            "ticks": False,
            "labelLimit": 120,
        },
    }
    opacity = {
        "field": "value",
        "type": "quantitative",
        "scale": {"type": "sqrt", "domain": [0, 1], "range": [0.04, 1]},
        "legend": None,
    }
    mark = {"type": "rect", "color": "var(--c1)", "stroke": "var(--line)"}
    return _spec(
        {"step": 24},
        data=_data(values),
        mark=mark,
        encoding={"x": x, "y": _sites(), "opacity": opacity},
    )

"""A verdict for every site: did training help it, and does sharing?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedvlm.figures.series import capital
from fedvlm.metrics import METRICS
from fedvlm.report.folder import Compared, Run
from fedvlm.report.parts import MOST, Items, Part, Section, Text, Verdict, Verdicts
from fedvlm.rounds.claims import STAY, UNCLEAR, changes, harm
from fedvlm.rounds.results import UNSCORED

TITLE = "What each site gets"
MODELS = (
    "Three models answer the held-out rows of a site, which are rows that nobody trained on: the "
    "untuned model is the model before training, the global model is one model for all sites, and "
    "the personal model is the site's own."
)
BETTER, WORSE, OPEN = "better", "worse", "unclear"


def of_run(run: Run) -> Section:
    """The verdicts of a run: personal against untuned, and against global."""
    if not run.models:
        why = UNSCORED if run.opened else "no round has been scored yet"
        return Section("verdicts", TITLE, [Text(f"There is no verdict: {why}.")])
    if not METRICS[run.metric].share:
        why = f"the metric {METRICS[run.metric].head} is no share of right answers"
        return Section("verdicts", TITLE, [Text(f"There is no verdict: {why}.")])
    whole = run.opened is not None and {"untuned", "global", "personal"} <= run.answers.keys()
    found = changes(run.answers, run.metric) if whole else {}
    verdicts = [
        _paired(site, found[site])
        if len(found.get(site, ())) == 2
        else _apart(site, run.models, run.metric)
        for site in run.sites
    ]
    parts: list[Part] = [Text(MODELS), _counted(verdicts)]
    parts.append(Verdicts(verdicts[:MOST], max(0, len(verdicts) - MOST)))
    parts.append(Items(list(_limits(run, bool(found))), "What this run cannot tell"))
    return Section("verdicts", TITLE, parts)


def _paired(site: str, found: Mapping[str, Mapping[str, float]]) -> Verdict:
    """A verdict by answers to the same rows."""
    marks = {other: _mark(change["low"], change["high"]) for other, change in found.items()}
    rows = int(found["untuned"]["n"])
    text = (
        f"On the site's {rows} held-out rows, its personal model is "
        f"{_points(found['untuned'], 'the untuned model')}, and "
        f"{_points(found['global'], 'the global model')}."
    )
    return Verdict(site, marks["untuned"], _head(marks, rows), _tied(text))


def _apart(site: str, models: Mapping[str, Mapping[str, Any]], metric: str) -> Verdict:
    """A verdict by the models' own intervals, where answers to the same rows are not here."""
    bounds = {m: models[m]["intervals"].get(site, {}).get(metric) for m in models}
    scores = {m: models[m]["clients"].get(site, {}).get(metric) for m in models}
    rows = models["personal"]["clients"][site].get("examples")
    told = ", ".join(
        f"{m} {100 * s:.1f} %" + (f" ({100 * b[0]:.0f} to {100 * b[1]:.0f})" if b else "")
        for m, s in scores.items()
        if s is not None
        for b in [bounds[m]]
    )
    counted = f"On the site's {rows:g} held-out rows" if rows else "On the site's held-out rows"
    own = bounds["personal"]
    if own is None or bounds["untuned"] is None or bounds["global"] is None:
        why = "no interval is known, so the difference may be chance"
        return Verdict(site, OPEN, "Not decided", f"{counted}: {told}; {why}.")
    marks = {
        m: BETTER if own[0] > b[1] else WORSE if own[1] < b[0] else OPEN
        for m in ("untuned", "global")
        for b in [bounds[m]]
    }
    how = "A difference counts only where the 95 % intervals in brackets do not overlap."
    head = _head(marks, int(rows or 0))
    return Verdict(site, marks["untuned"], head, _tied(f"{counted}: {told}. {how}"))


def _tied(text: str) -> str:
    """The text with no line break between a number and its unit."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _head(marks: Mapping[str, str], rows: int) -> str:
    """The verdict in one sentence."""
    few = f"{rows} rows do" if rows else "its rows do"
    return {
        (BETTER, BETTER): "Training helps, and a model of its own serves the site best",
        (BETTER, OPEN): "Training helps; its own and the global model are about level",
        (BETTER, WORSE): "Training helps, and the global model serves the site best",
        (OPEN, BETTER): f"Its own model is ahead of the global model; {few} not show a gain "
        "over the untuned model",
        (OPEN, OPEN): f"Not decided: {few} not show a clear difference",
        (OPEN, WORSE): "The global model serves the site better than its own",
        (WORSE, BETTER): "Training harms this site: the untuned model answers better",
        (WORSE, OPEN): "Training harms this site: the untuned model answers better",
        (WORSE, WORSE): "Training its own model harms this site",
    }[marks["untuned"], marks["global"]]


def _mark(low: float, high: float) -> str:
    return BETTER if low > 0 else WORSE if high < 0 else OPEN


def _points(change: Mapping[str, float], other: str) -> str:
    """A difference in words: ``12.0 points above OTHER (95 % interval: +3 to +20)``."""
    gain, low, high = (100 * change[key] for key in ("gain", "low", "high"))
    way = f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}"
    way = "level with" if round(gain, 1) == 0 else way
    return f"{way} {other} (95 % interval: {_bound(low)} to {_bound(high)})"


def _bound(points: float) -> str:
    """The bound of an interval. It has the sign of the number, also near zero."""
    text = f"{points:+.0f}" if abs(points) >= 0.5 else f"{points:+.1f}"
    return "0" if not float(text) else text.replace("-", "−")


def _counted(verdicts: Sequence[Verdict]) -> Text:
    """How many sites have which verdict."""
    count = {mark: sum(v.mark == mark for v in verdicts) for mark in (BETTER, WORSE, OPEN)}
    words = {BETTER: "training helps", WORSE: "training harms", OPEN: "the rows do not decide"}
    told = "; ".join(
        f"for {count[mark]} of {len(verdicts)} sites, {words[mark]}"
        for mark in words
        if count[mark]
    )
    return Text(f"{capital(told)}.")


def _limits(run: Run, paired: bool) -> Iterator[str]:
    yield (
        "Whether a site would do as well alone. That needs a second run without sharing, at equal "
        "steps: fedvlm compare auto,lora,local"
    )
    yield (
        "How much another run would differ. The intervals cover the choice of held-out rows, not "
        "the chance in training; more seeds show that: fedvlm compare ... --seeds 3"
    )
    yield "How the models answer data that differ from the held-out rows."
    if paired:
        yield (
            "Differences are taken row by row. The two intervals of a site hold together with 95 %."
        )
    if run.opened is None:
        yield "How it ends: the run is unfinished, and these are its scores so far."


def of_comparison(found: Compared) -> Section:
    """The verdicts of a comparison: should a site take part, and how?"""
    if not found.verdicts:
        why = (
            "There is no verdict. A verdict needs the algorithm local, which trains each site "
            "alone, and a way of sharing with the same number of optimizer steps: fedvlm compare "
            "auto,lora,local"
        )
        return Section("verdicts", TITLE, [Text(why)])
    verdicts = [_compared(one) for one in found.verdicts]
    seeds = int(found.rows[0]["seeds"])
    ways = len(found.verdicts[0]["gains"])
    limits = [
        "How the models answer data that differ from the held-out rows.",
        "Differences are taken row by row, against training alone"
        + (f". All {ways} intervals of a site hold together with 95 %." if ways > 1 else "."),
    ]
    if seeds == 1:
        limits.insert(
            0,
            "How much another run would differ. There is one seed, and the intervals cover the "
            "choice of held-out rows only; --seeds 3 shows more.",
        )
    parts: list[Part] = [
        Text(
            "Should a site take part, or train alone? Every algorithm but local is a way of "
            "sharing; with local, a site trains alone, for the same number of steps. The site's "
            "own models answer its held-out rows, which are rows that nobody trained on."
        ),
        Verdicts(verdicts[:MOST], max(0, len(verdicts) - MOST)),
        Items(limits, "What this comparison cannot tell"),
    ]
    return Section("verdicts", TITLE, parts)


def _compared(one: Mapping[str, Any]) -> Verdict:
    name, rows = one["algorithm"], int(one["n"])
    against = _points(one, "training alone")
    worst = harm(one["gains"])
    head = {
        STAY: "Train alone: no way of sharing is ahead, and one is clearly behind",
        UNCLEAR: f"Not decided: {rows} rows do not show a clear difference",
    }.get(one["verdict"], f"Take part: {one['verdict']} ({name}) is clearly ahead")
    mark = WORSE if one["verdict"] == STAY else OPEN if one["verdict"] == UNCLEAR else BETTER
    best = "the best way of sharing, " if one["verdict"] == UNCLEAR else ""
    text = f"On {rows} held-out rows, {best}{name}, is" if best else f"On {rows} rows, {name} is"
    text += f" {against}. Alone: {100 * one['local']:.1f} %."
    if worst and worst != name:
        text += f" Clearly harmful here: {worst}, {_points(one['gains'][worst], 'training alone')}."
    return Verdict(one["client"], mark, head, _tied(text))

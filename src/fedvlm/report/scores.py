"""The scores of all sites with their intervals, and the curves over the rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedvlm.errors import brief
from fedvlm.figures.series import capital, curve, end_scores, first_scores, mean_scores, seed_curves
from fedvlm.intervals import few_rows, scored
from fedvlm.metrics import METRICS, mean, number, size
from fedvlm.report import charts
from fedvlm.report.folder import SHOWN, Compared, Run
from fedvlm.report.parts import Chart, Part, Section, Table, Text, table
from fedvlm.rounds.claims import BASELINES
from fedvlm.rounds.grouped import cells, shown_metrics
from fedvlm.rounds.results import UNSCORED, Results

MEASURES = {
    "exact_match": "the share of held-out rows whose answer equals the reference, letter by letter",
    "token_f1": "how many words an answer and its reference share, from 0 to 100 %",
    "rouge_l": "the longest sequence of words that an answer and its reference share, from 0 to "
    "100 %",
    "bleu": "how many short sequences of words an answer and its reference share, from 0 to 100 %",
    "reward_accuracy": "the share of held-out rows for which the model prefers the chosen answer",
}
"""What the main metrics measure."""

MODELS = {
    "untuned": "the model before training",
    "global": "one model for all sites, from what the sites share",
    "personal": "the model of each site",
}


def of_run(run: Run) -> Section:
    """The scores of a run, by site and model."""
    if not run.models:
        why = UNSCORED if run.opened else "no round has been scored yet"
        return Section("scores", "Scores", [Text(f"There are no scores: {why}.")])
    metric = METRICS[run.metric]
    values = list(_values(run))
    parts: list[Part] = []
    if values:
        spec = charts.scores(values, SHOWN, metric.head, metric.share, kinds=True)
        note = f"Lines are 95 % intervals. {charts.BESIDE}{charts.rest(run.sites)}"
        title = f"{capital(metric.head)} of each site's models"
        parts.append(Chart(spec, title, note, charts.keys(SHOWN, kinds=True)))
    parts.append(_table(run))
    rows = {c: s["examples"] for c, s in run.models["personal"]["clients"].items() if _has(s)}
    if few := few_rows(rows, named=False):
        parts.append(Text(f"{capital(few)}.", "warning"))
    if (found := run.opened) and found.results.table.get("groups"):
        parts.append(_groups(run, found.results))
    if others := [m for m in run.models["personal"]["summary"] if m in METRICS and m != run.metric]:
        parts.append(_others(run, others))
    return Section("scores", "Scores", parts)


def _has(scores: Mapping[str, Any]) -> bool:
    return "examples" in scores


def _values(run: Run) -> Iterable[dict[str, Any]]:
    for site, label in charts.labels(run.sites).items():
        for model in SHOWN:
            score = run.models[model]["clients"].get(site, {}).get(run.metric)
            bounds = run.models[model]["intervals"].get(site, {}).get(run.metric)
            if score is not None:
                low, high = bounds or (score, score)
                place = {"site": label, "model": model}
                yield {**place, "value": score, "low": low, "high": high}


def _table(run: Run) -> Table:
    first, models = run.metric, run.models
    rows = []
    for site in run.sites:
        cells = [
            scored(
                first,
                models[m]["clients"].get(site, {}).get(first),
                models[m]["intervals"].get(site, {}).get(first),
            )
            for m in SHOWN
        ]
        rows.append((site, f"{models['personal']['clients'][site].get('examples', '')}", *cells))
    foot = []
    for key, head, interval in (
        ("mean", "mean of sites", "interval"),
        ("mean_rows", "mean of rows", "interval_rows"),
        ("worst10", "worst 10 %", ""),
    ):
        found = [models[m]["summary"].get(first, {}) for m in SHOWN]
        count = f"{models['personal'].get('rows') or ''}" if key == "mean_rows" else ""
        foot.append((head, count, *(scored(first, s.get(key), s.get(interval)) for s in found)))
    title = f"{capital(METRICS[first].head)} on held-out rows, in brackets its 95 % interval"
    heads = ("site", "rows", *SHOWN)
    return table(title, heads, rows, foot=foot, more="table.csv")


def _groups(run: Run, results: Results) -> Table:
    """The personal models by site and value of ``eval.group_by``."""
    column = brief(results.table["groups"]["column"], 40)
    metrics = shown_metrics(run.metric, results.metrics)
    rows = [
        (client or "all sites", value, count, *scores)
        for client, value, count, scores in cells(metrics, run.answers.get("personal", []))
    ]
    heads = ("site", column, "rows", *(METRICS[m].head for m in metrics))
    title = f"Personal models by site and {column}, in brackets 95 % intervals"
    return table(title, heads, rows, texts=(1,), more="groups.csv")


def _others(run: Run, metrics: Sequence[str]) -> Table:
    rows = []
    for metric in metrics:
        found = [run.models[m]["summary"].get(metric, {}) for m in SHOWN]
        cells = [scored(metric, s.get("mean"), s.get("interval")) for s in found]
        rows.append((METRICS[metric].head, *cells))
    return table("Other scores, means of sites", ("score", *SHOWN), rows, folded=True)


def curves_of_run(run: Run) -> Section:
    """The means of the scores by round, and the loss of training."""
    metric, title = METRICS[run.metric], "Round by round"
    kinds = ("global", "personal")
    found = {kind: curve(run.lines, kind, run.metric) for kind in kinds} if metric.share else {}
    values = [
        {"round": round_, "series": kind, "value": mean(scores.values())}
        for kind, points in found.items()
        for round_, scores in points.items()
    ]
    losses = {
        int(line["round"]): mean(told)
        for line in run.lines
        if (told := [v for v in line.get("train_loss", {}).values() if math.isfinite(v)])
        and not _ending(run, line)
    }
    parts: list[Part] = []
    if values:
        spec = charts.curves(values, kinds, f"{metric.head}, mean of sites", True, kinds=True)
        head = f"{capital(metric.head)}, the mean of the scored sites"
        parts.append(Chart(spec, head, charts.BESIDE, charts.keys(kinds, kinds=True)))
    if losses:
        points = [{"round": r, "series": "loss", "value": v} for r, v in losses.items()]
        spec = charts.curves(points, ("loss",), "loss in training", False)
        about = "The loss measures how surprising the sites' own answers are to the model."
        note = f"{about} {charts.BESIDE}"
        parts.append(Chart(spec, "Loss in training, the mean of sites", note))
    if not parts:
        none = "The sites have told neither scores nor losses."
        none = none if run.round else "No round is done."
        return Section("rounds", title, [Text(none)])
    rounds = sorted({r for points in found.values() for r in points} | losses.keys())
    rows = [
        (
            str(r),
            *(
                number(run.metric, mean(found[k][r].values())) if r in found.get(k, {}) else ""
                for k in kinds
            ),
            f"{losses[r]:.3f}" if r in losses else "",
        )
        for r in rounds
    ]
    heads = ("round", "global", "personal", "loss in training")
    parts.append(table("Means of sites by round", heads, rows, more="metrics.jsonl", folded=True))
    if any(_ending(run, line) for line in run.lines):
        what = "local tuning" if run.config.train.tuning else "the average over the rounds"
        parts.append(Text(f"Round {run.round} is the ending of the run: {what}.", "note"))
    return Section("rounds", title, parts)


def _ending(run: Run, line: Mapping[str, Any]) -> bool:
    return line["round"] > run.config.train.rounds


def of_comparison(found: Compared) -> Section:
    """The scores of a comparison, by algorithm and by site."""
    run = found.first
    name, metric = run.metric, METRICS[run.metric]
    parts: list[Part] = [_algorithms(found)]
    lines = {a: [r.lines for r in runs] for a, runs in found.runs.items()}
    ends = {a: mean_scores(end_scores(own, name) for own in seeds) for a, seeds in lines.items()}
    first = mean_scores(first_scores(own, name) for seeds in lines.values() for own in seeds)
    single = all(len(runs) == 1 for runs in found.runs.values())
    values = [
        {"site": label, "model": a, "value": scores[site], "low": low, "high": high}
        for a, scores in ends.items()
        for site, label in charts.labels(run.sites, len(ends)).items()
        if site in scores
        for low, high in [_bounds(found.runs[a], site, single) or (scores[site], scores[site])]
    ]
    spec = charts.scores(values, list(ends), metric.head, metric.share, kinds=False)
    lines_are = "Lines are 95 % intervals over rows. " if single else "Means over seeds. "
    note = f"{lines_are}{charts.BESIDE}{charts.rest(run.sites, len(ends))}"
    title = f"{capital(metric.head)} of each site's own model"
    parts.append(Chart(spec, title, note, charts.keys(list(ends))))
    rows = []
    for site in run.sites:
        cells = [
            scored(name, ends[a].get(site), _bounds(found.runs[a], site, single)) for a in ends
        ]
        count = run.models["personal"]["clients"][site].get("examples", "")
        rows.append((site, f"{count}", number(name, first.get(site)), *cells))
    title = f"{capital(metric.head)} of each site's own model, by algorithm"
    parts.append(table(title, ("site", "rows", "untuned", *ends), rows, more="comparison.csv"))
    return Section("scores", "Scores", parts)


def _bounds(runs: Sequence[Run], site: str, single: bool) -> Sequence[float] | None:
    """The interval of a site's score, of one seed."""
    if not single or not runs:
        return None
    return runs[0].models["personal"]["intervals"].get(site, {}).get(runs[0].metric)


def _algorithms(found: Compared) -> Table:
    """A row an algorithm, as the command prints it."""
    name = found.first.metric
    seeds = int(found.rows[0]["seeds"])
    rows = []
    for row in found.rows:
        low: Any = row.get("personal_low")
        high: Any = row.get("personal_high")
        cell = scored(name, row["personal"], None if low is None else [low, high])
        if row.get("standard_error") is not None:
            cell += f" ± {100 * row['standard_error']:.1f}"
        cells = [cell, number(name, row["worst10"]), number(name, row["global"])]
        cells += [_gain(row, baseline) for baseline in BASELINES]
        steps = f"{row['steps']:,.0f}" if row.get("steps") else "unknown"
        rows.append((row["algorithm"], *cells, steps, size(row["bytes_up"])))
    rows.append(("(untuned)", number(name, found.rows[0]["untuned"]), *[""] * 6))
    over = (
        "± standard error over seeds" if seeds > 1 else "in brackets the 95 % interval over sites"
    )
    heads = ["algorithm", "personal models", "worst 10 %", "global model"]
    heads += [f"over {baseline}" for baseline in BASELINES]
    title = f"{capital(METRICS[name].head)}, means of sites; {over}"
    return table(title, (*heads, "steps", "sent up"), rows)


def _gain(row: Mapping[str, Any], baseline: str) -> str:
    """The relative gain over a baseline, where its interval excludes zero."""
    found, low, high = (row.get(f"gain_over_{baseline}{end}") for end in ("", "_low", "_high"))
    if row["algorithm"] == baseline:
        return ""
    if found is None or low is None or high is None or low <= 0 <= high:
        return "unclear"
    return f"{100 * found:+.1f} % ({100 * low:+.0f} to {100 * high:+.0f})"


def curves_of_comparison(found: Compared) -> Section:
    """The means of the personal models by round."""
    metric = METRICS[found.first.metric]
    by = {
        name: dict(zip(rounds, map(mean, seeds), strict=True))
        for name, runs in found.runs.items()
        for rounds, seeds in [seed_curves([r.lines for r in runs], found.first.metric)]
    }
    values = [
        {"round": r, "series": name, "value": v} for name, own in by.items() for r, v in own.items()
    ]
    if not values:
        return Section("rounds", "Round by round", [Text("No run was scored.")])
    spec = charts.curves(values, list(by), f"{metric.head}, mean of sites", True)
    rows = [
        (str(r), *(number(found.first.metric, own.get(r)) for own in by.values()))
        for r in sorted({r for own in by.values() for r in own})
    ]
    title = f"{capital(metric.head)} of the personal models, mean of sites"
    chart = Chart(spec, title, charts.BESIDE, charts.keys(list(by)))
    told = table("Means of sites by round", ("round", *by), rows, folded=True)
    return Section("rounds", "Round by round", [chart, told])

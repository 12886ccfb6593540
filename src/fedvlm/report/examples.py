"""Held-out rows of each site with the answers of all models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedvlm.engines.base import Answer
from fedvlm.errors import FedVLMError, cut
from fedvlm.metrics import METRICS, number
from fedvlm.report.folder import SHOWN, Compared, Run
from fedvlm.report.parts import Answered, Example, Examples, Part, Section, Text
from fedvlm.report.thumbnails import Rows
from fedvlm.rounds.results import by

NAME, TITLE = "rows", "Questions and answers"
EACH = 20  # rows of a site
LONGEST = 1500  # characters of a question, a reference or an answer
Look = Callable[[Any, str], tuple[str, str] | None]
Lists = Mapping[str, Sequence[Answer]]


def of_run(run: Run, room: int) -> Section:
    """The first scored rows of each site.

    Args:
        run: the run.
        room: the most bytes of all rows in the page.
    """
    return _section(run, {m: run.answers[m] for m in SHOWN if m in run.answers}, room)


def of_comparison(found: Compared, room: int) -> Section:
    """As :func:`of_run`, with the personal models of all algorithms, of one seed."""
    run = found.first
    lists = {"untuned": run.answers.get("untuned", ())}
    seed = run.config.seed  # the same seed has the same rows
    for name, runs in found.runs.items():
        for one in runs:
            if one.config.seed == seed and "personal" in one.answers:
                lists[name] = one.answers["personal"]
    return _section(run, {name: answers for name, answers in lists.items() if answers}, room)


def _section(run: Run, lists: Lists, room: int) -> Section:
    if run.deployed:
        why = (
            "The rows of a deployed run never leave the sites, and neither do the answers. So the "
            "server's report has none. Each site finds its own in STATE/runs/ on its machine, in "
            "the folder answers/."
        )
        return Section(NAME, TITLE, [Text(why)])
    if not lists:
        why = "; ".join(run.missing) or "the folder answers/ has no file yet"
        return Section(NAME, TITLE, [Text(f"No answers can be shown: {why}.")])
    parts: list[Part] = [
        Text(
            f"The first {EACH} scored rows of each site, in the order that the run's seed has "
            "drawn: nobody has picked them. “Answers differ” marks rows whose models disagree. "
            "These rows were not used for training."
        )
    ]
    look, why_not = _rows(run)
    if why_not:
        parts.append(Text(f"Questions and pictures are missing: {why_not}.", "warning"))
    sites = list(_sites(run, lists))
    shown = {site: list[Example]() for site, _ in sites}
    left = _fill(sites, shown, look, run.metric, room)
    if left:
        parts.append(
            Text(f"{left:,} rows are left out so that the page stays small.", "note"),
        )
    for number_, (site, rows) in enumerate(sites):
        note = f"{len(shown[site])} of {len(rows[0])} scored rows"
        if shown[site]:
            parts.append(Examples(site, shown[site], note, folded=number_ > 0))
    return Section(NAME, TITLE, parts)


def _rows(run: Run) -> tuple[Look, str]:
    """Reads the rows of the run again. Without them, gives the reason."""
    try:
        return Rows(run.config, run.folder), ""
    except (FedVLMError, OSError, ValueError) as error:
        reason = " ".join(cut(str(error), 300).split())
    return (lambda number, reference: None), reason.rstrip(".")


def _sites(run: Run, lists: Lists) -> Iterator[tuple[str, tuple[list[Answer], Lists]]]:
    """The sites with their first rows; each row has the answer of each model."""
    found = {model: by("client", answers) for model, answers in lists.items()}
    first = next(iter(found.values()))
    for site in first:
        yield site, (first[site], {model: own.get(site, ()) for model, own in found.items()})


def _fill(
    sites: Sequence[tuple[str, tuple[list[Answer], Lists]]],
    shown: Mapping[str, list[Example]],
    look: Look,
    metric: str,
    room: int,
) -> int:
    """Adds the first row of each site, then the second one, as long as there is room.

    Returns:
        The number of rows without room.
    """
    left = 0
    for place in range(EACH):
        for site, (first, lists) in sites:
            if place >= len(first):
                continue
            if room <= 0:
                left += 1
                continue
            example = _example(first[place], lists, place, look, metric)
            room -= _weight(example)
            shown[site].append(example)
    return left


def _weight(example: Example) -> int:
    """About the bytes of a row in the page."""
    texts = [example.question or "", example.reference, *(a.text for a in example.answers)]
    marks = 400 + 250 * len(example.answers)
    return marks + len(example.picture) + 2 * sum(len(t.encode()) for t in texts)


def _example(row: Answer, lists: Lists, place: int, look: Look, metric: str) -> Example:
    given = {
        model: own[place]
        for model, own in lists.items()
        if place < len(own) and own[place]["row"] == row["row"]
    }
    question, picture = look(row["row"], row["reference"]) or (None, "")
    return Example(
        str(row["row"]),
        None if question is None else cut(question, LONGEST),
        cut(row["reference"], LONGEST),
        [_answered(model, answer, metric) for model, answer in given.items()],
        picture,
        len({answer["prediction"] for answer in given.values()}) > 1,
    )


def _answered(model: str, answer: Answer, metric: str) -> Answered:
    right = bool(answer["exact_match"]) if "exact_match" in answer else None
    told = "" if metric == "exact_match" else f"{METRICS[metric].head} "
    score = f"{told}{number(metric, answer[metric])}" if told else ""
    return Answered(model, cut(answer["prediction"], LONGEST), score, right)

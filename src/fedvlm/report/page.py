"""The page of a run or of a comparison: its sections in order."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from fedvlm.algorithms.table import find
from fedvlm.errors import brief, counted
from fedvlm.figures.series import capital
from fedvlm.metrics import METRICS
from fedvlm.report import examples, privacy, scores, settings, sites, verdicts
from fedvlm.report.folder import Compared, Run
from fedvlm.report.parts import Page, Part, Section, Table, Terms, table
from fedvlm.rounds.located import located
from fedvlm.rounds.progress import source
from fedvlm.store.run import METRICS as LINES
from fedvlm.version import __version__

WORDS = {
    "Site": "Whoever takes part with rows of its own, such as a hospital. It is also called a "
    "client.",
    "Row": "A picture with a question and the expected answer, the reference.",
    "Held-out rows": "Rows that no model was trained on. All scores are of these rows.",
    "Untuned model": "The model before training.",
    "Global model": "One model for all sites, made from what the sites share.",
    "Personal model": "The model of one site: what is shared, with what the site keeps.",
    "Adapter": "The small part of a model that is trained: two factors, A and B, beside each "
    "adapted layer (LoRA). The rest of the model stays as it was and never travels.",
    "Round": "The sites train for some steps, and the server averages what they send.",
    "Points": "Differences of shares, in percentage points: from 20 % to 30 % is 10 points.",
    "95 % interval": "Where the score would lie for other rows like these. A wide interval means "
    "few rows.",
}


def of(found: Run | Compared, room: int) -> Page:
    """The page.

    Args:
        found: a run or a comparison.
        room: the most bytes of the held-out rows.
    """
    return _of_run(found, room) if isinstance(found, Run) else _of_comparison(found, room)


def _of_run(run: Run, room: int) -> Page:
    sections = [
        verdicts.of_run(run),
        _words(run),
        scores.of_run(run),
        scores.curves_of_run(run),
        sites.of_run(run),
        sites.costs_of_run(run),
        privacy.of_run(run),
        examples.of_run(run, room),
        settings.of_run(run),
    ]
    count = len(run.clients)
    how = "on their own machines" if run.deployed else "simulated in one process"
    pooled = find(run.config.algorithm.name).pools
    lead = f"{counted(count, 'site')}, {how}, adapted a vision-language model " + (
        "on pooled rows." if pooled else "without pooling their rows."
    )
    facts = {
        "Algorithm": _algorithm(run.config.algorithm.name),
        "Model": brief(_last(run.config.model.name), 80),
        "Data": "at the sites" if run.deployed else brief(_last(source(located(run.config))), 80),
        "Rounds": _rounds(run),
        "Score": _measured(run.metric),
        "Finished": _when(run) if run.opened else "no",
    }
    return Page(
        f"Run: {brief(run.folder.absolute().name, 60)}",
        lead,
        facts,
        sections,
        made(),
        list(_banners(run)),
    )


def _of_comparison(found: Compared, room: int) -> Page:
    run = found.first
    sections = [
        verdicts.of_comparison(found),
        _words(run, _algorithms(found)),
        scores.of_comparison(found),
        scores.curves_of_comparison(found),
        sites.of_run(run),
        sites.costs_of_comparison(found),
        privacy.of_comparison(found),
        examples.of_comparison(found, room),
        settings.of_comparison(found),
    ]
    count, ways = len(run.clients), len(found.runs)
    lead = (
        f"{ways} algorithms on the same {count:,} sites, with the same rows and the same initial "
        "model."
    )
    seeds = max(len(runs) for runs in found.runs.values())
    facts = {
        "Algorithms": ", ".join(brief(name, 40) for name in found.runs),
        "Seeds": str(seeds),
        "Model": brief(_last(run.config.model.name), 80),
        "Data": brief(_last(source(located(run.config))), 80),
        "Rounds": str(run.config.train.rounds),
        "Score": _measured(run.metric),
    }
    title = f"Comparison: {brief(found.folder.absolute().name, 60)}"
    return Page(title, lead, facts, sections, made(), list(_banners(run)))


def _words(run: Run, *more: Part) -> Section:
    head = METRICS[run.metric].head
    words = {**WORDS}
    if about := scores.MEASURES.get(run.metric):
        words[capital(head)] = f"{capital(about)}."
    return Section("words", "Words in this report", [Terms(words), *more])


def _algorithms(found: Compared) -> Table:
    """What the algorithms of a comparison share."""
    rows = []
    for name, runs in found.runs.items():
        entry = find(runs[0].config.algorithm.name) if runs else None
        known = (entry.sends, entry.keeps, entry.source) if entry else ("", "", "")
        rows.append((name, *known))
    heads = ("algorithm", "a site sends", "and keeps", "source")
    title = "The algorithms: the parts of the adapter that a site sends, and keeps"
    return table(title, heads, rows, texts=(1, 2, 3))


def _measured(metric: str) -> str:
    head = METRICS[metric].head
    about = scores.MEASURES.get(metric)
    return f"{head}: {about}" if about else head


def _algorithm(name: str) -> str:
    entry = find(name)
    if entry.pools:
        return f"{name}: all rows in one place, without federation"
    return f"{name}: of its adapter, a site sends {entry.sends} each round, and keeps {entry.keeps}"


def _rounds(run: Run) -> str:
    planned = run.config.train.rounds
    about = run.privacy
    if about is not None and about["rounds"] < planned and run.opened:
        return f"{about['rounds']} of {planned}: the privacy budget ended the run"
    done = min(run.round, planned)
    told = f"{planned}" if done == planned else f"{done} of {planned}"
    earlier = run.opened.results.table.get("planned") if run.opened else None
    if earlier and earlier[-1].get("stopped"):
        return f"{told}; the validation loss no longer fell (planned: {earlier[-1]['rounds']})"
    numbers = ", ".join(str(one["rounds"]) for one in earlier or ())
    return f"{told} (planned before: {numbers})" if earlier else told


def _last(name: str) -> str:
    """Of a path its last part: others may see the page."""
    return Path(name).name if Path(name).is_absolute() else name


def _when(run: Run) -> str:
    done = (run.folder / LINES).stat().st_mtime
    return f"{datetime.fromtimestamp(done, UTC):%Y-%m-%d %H:%M} UTC"


def made() -> str:
    """When and by which version a page is made."""
    return f"Made by fedvlm {__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def _banners(run: Run) -> Iterator[str]:
    if run.opened is None:
        yield (
            f"This run is unfinished, after round {run.round} of {run.config.train.rounds}. To "
            f"finish it: fedvlm {'deploy ' * run.deployed}run --resume {run.folder.name}"
        )
    if planted := run.config.privacy.canaries:
        yield (
            f"An experiment: the run has {planted} canaries, half of them trained on with wrong "
            "answers. Do not use its models."
        )
    for why in run.missing:
        yield f"Something is missing here: {why}"
    if not run.deployed:
        yield (
            "This file shows rows of the sites, with pictures and answers. Handle it like the data."
        )

"""The parts of the benchmark: each makes uploads, attacks them, and returns tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from _inversion import cases, pictures, words
from _inversion.cases import DRAWS, Noises, protection
from _inversion.lab import Lab
from _inversion.lineup import Lineup
from _inversion.simulate import downhill
from _inversion.uploads import Case, Observed
from fedvlm.tree import Tree, factor


@dataclass
class Part:
    """The result of a part.

    Attributes:
        tables: Markdown.
        numbers: headline numbers by name.
        grid: title -> pictures ``[rows, 3, side, side]``, for a figure.
        labels: one a row of the grid.
    """

    tables: list[str]
    numbers: dict[str, float] = field(default_factory=dict)
    grid: dict[str, Tensor] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)


def tokens(lab: Lab, noise: Noises, quick: bool) -> Part:
    """The attacks on texts."""
    chosen = cases.of_tokens(noise, large=lab.source.model != "tiny")
    if quick:
        chosen = [Case("plora"), Case("plora", rank=64)]
        chosen += [Case("plora", rank=64, noise=n) for n in list(noise.values())[:1]]
    lines, numbers = [], {}
    for case in chosen:
        uploads = lab.uploads(case)
        text, answer = (
            words.mean([lab.words.attack(one, part) for one in uploads])
            for part in ("text", "answer")
        )
        fits = f"{percent(text['precision'])} | {percent(text['recall'])}"
        lines.append(
            f"| {_settings(case, noise)} | {len(uploads)} | {text['secret']:.0f} | {fits} | "
            f"{percent(text['best'])} | {percent(text['frequent'])} | {percent(answer['best'])} | "
            f"{percent(answer['frequent'])} |"
        )
        numbers[f"{case.rank} {protection(case, noise)}"] = text["best"]
    head = [
        f"| {_HEAD} | sites | tokens | fit: right | fit: found | best | guess | answer: best | "
        "answer: guess |",
        _rule(_COLUMNS + 8),
    ]
    return Part(["\n".join([*head, *lines]), _examples(lab, noise)], numbers)


def _examples(lab: Lab, noise: Noises) -> str:
    """The tokens that fit best, beside the true texts, of the first sites."""
    shown = {
        "rank 8": (Case("plora"), "answer", 6),
        "rank 64": (Case("plora", rank=64), "text", 14),
        **{
            f"rank 64, epsilon {e:g}": (Case("plora", rank=64, noise=n), "text", 14)
            for e, n in list(noise.items())[:1]
        },
    }
    uploads = {name: lab.uploads(case)[:3] for name, (case, *_) in shown.items()}
    lines = [
        "| the site's text | " + " | ".join(f"{n}: {shown[n][1]}" for n in shown) + " |",
        _rule(1 + len(shown)),
    ]
    for site in range(min(3, len(lab.rows))):
        question, answer = lab.texts(lab.rows[site])
        found = [
            _list(lab.words.named(uploads[name][site], part, most))
            for name, (_, part, most) in shown.items()
        ]
        lines.append(f"| {_cell(question)} **{_cell(answer)}** | " + " | ".join(found) + " |")
    return "\n".join(lines)


def lineup(lab: Lab, noise: Noises, quick: bool) -> Part:
    """The line-ups of candidates, in the first round and in a later one."""
    chosen, rows = cases.of_lineup(noise), lab.rows
    kinds = ("row", "picture", "text") if lab.source.data is None else ("row", "picture")
    if quick:
        chosen, rows = (
            [Case("plora"), *(c for c in chosen if c.noise and c.rows == 1)][:2],
            rows[:2],
        )
    draws = 1 if quick else DRAWS
    observed = [(case, draw) for case in chosen for draw in range(draws if case.noise else 1)]
    ranks = _ranks(lab, [lab.uploads(*one) for one in observed], observed, kinds, rows)
    later = [] if quick or lab.source.data else cases.of_later_rounds()
    for case in later:  # each begins with another model
        one = [(case, 0)]
        ranks |= _ranks(lab, [lab.uploads(case)], one, ("row", "picture"), rows)
    head = " | ".join(f"{kind}: first | {kind}: median" for kind in kinds)
    lines = [f"| {_HEAD} | n | {head} |", _rule(_COLUMNS + 1 + 2 * len(kinds))]
    numbers = {}
    for case in [*chosen, *later]:
        each = [ranks.get((case, kind), []) for kind in kinds]
        cells = " | ".join(
            f"{percent(first(r))} | {statistics.median(r):g}" if r else " | " for r in each
        )
        lines.append(f"| {_settings(case, noise)} | {len(each[0])} | {cells} |")
        if case.rows == case.steps == 1 and case.optimizer == "sgd":
            numbers[protection(case, noise)] = first(ranks[case, "picture"])
    return Part(["\n".join(lines)], numbers)


def _ranks(
    lab: Lab,
    uploads: Sequence[Sequence[Observed]],
    observed: Sequence[tuple[Case, int]],
    kinds: Sequence[str],
    rows: Sequence[int],
) -> dict[tuple[Case, str], list[float]]:
    """Case and kind -> the ranks of the rows, over all draws."""
    begin = uploads[0][0].begin
    names = sorted({n for sites in uploads for n in sites[0].moved})
    if observed[0][0].round == 1:  # B is zero, so A has no gradient
        names = [n for n in names if factor(n) == "B"]
    candidates = Lineup(lab.simulator, begin, names, lab.known, lab.rows)
    goals: list[dict[int, Tree]] = [
        {int(row): downhill(site.moved) for site in sites for row in site.rows} for sites in uploads
    ]
    noisy = [bool(case.noise) for case, _ in observed]
    found: dict[tuple[Case, str], list[float]] = {}
    for kind in kinds:
        for row in rows:
            places = candidates.ranks(row, kind, [goal[row] for goal in goals], noisy)
            for (case, _), place in zip(observed, places, strict=True):
                found.setdefault((case, kind), []).append(place)
    return found


def search(lab: Lab, noise: Noises, quick: bool) -> Part:
    """The searches for pictures."""
    count, steps = (1, (1, 1)) if quick else (3, (60, 240))
    sets = {(title, 1): case for title, case in cases.of_search(noise).items()}
    if lab.source.data is None and not quick:
        sets |= {("without protection", rows): Case("plora", rows=rows) for rows in (2, 4)}
    simulator, mean = lab.simulator, lab.simulator.pictures(lab.known).mean(0)
    wrong = simulator.pictures(lab.known[:99])
    part = Part([], labels=["\n".join(lab.texts(row)) for row in lab.rows[:count]])
    part.grid["the site's picture"] = simulator.pictures(lab.rows[:count])
    lines = [
        "| protection | rows a site | pictures | PSNR, dB | SSIM | place among 100 | "
        "features: cosine, right | features: cosine, others |",
        _rule(8),
    ]
    guess = mean.expand(count, -1, -1, -1)
    true = part.grid["the site's picture"]
    lines.append(
        f"| no attack: the mean picture | 1 | {count} | {pictures.psnr(guess, true).mean():.1f} | "
        f"{pictures.ssim(guess, true).mean():.2f} | – | – | – |"
    )
    for (title, each), case in sets.items():
        sites = lab.uploads(case)[: count if each == 1 else 1]
        rows = lab.rows[: each * len(sites)]
        goal = pictures.stacked([downhill(site.moved) for site in sites])
        found = pictures.pixels(
            simulator, sites[0].begin, rows, goal, mean, steps, bool(case.noise)
        )
        lines.append(_pictured(lab, title, each, found, rows, wrong))
        part.grid[title if each == 1 else f"{each} rows in a step"] = found
        if each == 1:
            part.numbers[title] = float(pictures.psnr(found, true).mean())
    part.tables.append("\n".join(lines))
    return part


def _pictured(
    lab: Lab, title: str, each: int, found: Tensor, rows: Sequence[int], wrong: Tensor
) -> str:
    """A line of the table of pictures."""
    simulator = lab.simulator
    true = simulator.pictures(rows)
    places, _, _ = pictures.ranks(found, true, wrong)
    shown = [simulator.features(x) for x in (found, true, wrong)]
    _, near, far = pictures.ranks(*shown)
    return (
        f"| {title} | {each} | {len(rows)} | {pictures.psnr(found, true).mean():.1f} | "
        f"{pictures.ssim(found, true).mean():.2f} | {', '.join(map(str, places))} | "
        f"{near.mean():.2f} | {far.mean():.2f} |"
    )


def features(lab: Lab, noise: Noises, quick: bool) -> Part:
    """The searches for image features."""
    count, steps = (1, 2) if quick else (6, 80)
    rows, simulator = lab.rows[:count], lab.simulator
    true, wrong = (simulator.features(simulator.pictures(r)) for r in (rows, lab.known[:99]))
    lines = ["| protection | n | cosine, right | cosine, others | places among 100 |", _rule(5)]
    part = Part([])
    for title, case in cases.of_search(noise).items():
        sites = lab.uploads(case)[:count]
        goal = pictures.stacked([downhill(site.moved) for site in sites])
        begin, start = sites[0].begin, wrong.mean(0)
        found = pictures.features(simulator, begin, rows, goal, start, steps, bool(case.noise))
        places, near, far = pictures.ranks(found, true, wrong)
        lines.append(
            f"| {title} | {count} | {near.mean():.2f} | {far.mean():.2f} | "
            f"{', '.join(map(str, places))} |"
        )
        part.numbers[title] = float(near.mean())
    part.tables.append("\n".join(lines))
    return part


_HEAD = "algorithm | optimizer | steps | rows a site | rank | round | protection"
_COLUMNS = 7


def _settings(case: Case, noise: Noises) -> str:
    return (
        f"`{case.algorithm}` | {case.optimizer} | {case.steps} | {case.rows} | {case.rank} | "
        f"{case.round} | {protection(case, noise)}"
    )


def _rule(columns: int) -> str:
    return "|" + " --- |" * columns


def percent(share: float) -> str:
    """A share in per cent; a dash for NaN."""
    return "–" if share != share else f"{100 * share:.0f}"


def first(ranks: Sequence[float]) -> float:
    """The share of line-ups with the right candidate in the first place."""
    return sum(rank <= 1 for rank in ranks) / len(ranks)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _list(found: Sequence[str]) -> str:
    return ", ".join(f"`{_cell(token.strip()) or '␣'}`" for token in found)

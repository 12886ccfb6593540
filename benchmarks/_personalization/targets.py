"""The targets of the default algorithm in the personalization benchmark, and its results."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Sequence
from typing import Any

from _common import ROOT
from _personalization import ranks as ranking
from _personalization.bootstrap import Estimate, difference
from _personalization.bootstrap import ratio as times
from _personalization.cells import TUNED
from _personalization.pages import percent, shown, table
from _personalization.scores import DEFAULT, Row, Scores, Values, parts, ranked, values
from fedvlm.metrics import mean

GAIN = 1.245  # personal models over lora, as the paper of plora reports
DIFFER = ("concept", "mixed", "vqarad")  # first words of the regimes of target (c)
SOURCE = ROOT / "src" / "fedvlm" / "algorithms" / f"{DEFAULT}.py"
BEFORE = (137, 77)  # its lines and its lines of code in 0.1.0
UNPROVEN = "not shown"
NONE = "no such cell yet"
KINDS = ("synthetic cells", "real cells")


def targets(rows: Sequence[Row]) -> str:
    """A table with a line a target, a column for synthetic and for real cells; reasons below it.

    `yes` and `**no**` are about the estimates. A claim of a lead needs an interval above zero;
    without it, the line says `not shown`.
    """
    groups = [compared(some) for some in parts(rows)]
    worst = values(rows, "worst10")
    if not any(groups):
        return f"`{DEFAULT}` was not compared yet."
    names = (
        ("(a) within one standard error of the best in every cell", best),
        ("(b) strictly first by average rank", rank),
        (f"(c) {GAIN:g} times `lora` in {', '.join(DIFFER)}", lambda own: gain(own, "lora")),
        (f"(c2) the same over `{TUNED}`", lambda own: gain(own, TUNED)),
        ("(d) never more than one standard error below `local`", below),
        ("(e) the best worst 10 %", lambda own: lowest(own, worst)),
    )
    body = [(name, *(judge(own) if own else NONE for own in groups)) for name, judge in names]
    body.append((f"(f) half the lines of `{DEFAULT}`, {BEFORE[0]} in 0.1.0", length(), ""))
    short = [(name, *(text.partition(": ")[0] for text in found)) for name, *found in body]
    return f"{table(('target', *KINDS), short)}\n\n{reasons(body)}"


def reasons(body: Sequence[Sequence[str]]) -> str:
    """What stands behind the verdicts of the table, an item a verdict."""
    lines = []
    for name, *found in body:
        for kind, text in zip(KINDS, found, strict=True):
            if why := text.partition(": ")[2]:
                place = "" if name.startswith("(f)") else f" {kind}"
                lines.append(f"- {name.split()[0]}{place}: {why}.")
    return "\n".join(lines)


def ratio(rows: Sequence[Row]) -> str:
    """The last line: the default over LoRA of equal steps, on all cells and pairs with both."""
    ours: dict[tuple[Any, ...], float] = {}
    theirs: dict[tuple[Any, ...], float] = {}
    for cell, own in ranked(rows).items():
        ours.update({(cell.name, *pair): s for pair, s in own.get(DEFAULT, {}).items()})
        theirs.update({(cell.name, *pair): s for pair, s in own.get("lora", {}).items()})
    what = f"personal models of {DEFAULT} / lora, equal steps"
    pairs = ours.keys() & theirs.keys()
    if not any(theirs[pair] for pair in pairs):
        return f"RATIO nan {what}"
    found = times(ours, theirs)
    return (
        f"RATIO {found.value:.3f} {what}, [{found.low:.3f}, {found.high:.3f}], {len(pairs)} pairs"
    )


def compared(rows: Sequence[Row]) -> Scores:
    """The cells in which the default is ranked with others, with the ranked algorithms."""
    return {c: own for c, own in ranked(rows).items() if DEFAULT in own and len(own) > 1}


def best(own: Scores) -> str:
    """Target (a)."""
    behind = []
    for cell, found in own.items():
        if DEFAULT not in ranking.winners(found):
            top = ranking.best(found)
            behind.append(f"{cell.name} {_lead(difference(found[DEFAULT], found[top]))} (`{top}`)")
    return _of(len(own) - len(behind), len(own), "cells", "behind in", behind)


def rank(own: Scores) -> str:
    """Target (b), over the cells with the same algorithms. The unit of its interval is a cell."""
    names, cells = ranking.block(own)
    if DEFAULT not in names or len(names) < 2:
        return "no cells with the same algorithms yet"
    placed = ranking.overview({c: own[c] for c in cells}, names)
    told = ", ".join(f"`{row.algorithm}` {row.rank:.2f}" for row in placed[:3])
    ours = next(row for row in placed if row.algorithm == DEFAULT)
    other = next(row for row in placed if row.algorithm != DEFAULT)
    places = [{cell.name: n for cell, n in row.places.items()} for row in (other, ours)]
    lead = difference(*places)
    if lead.value <= ranking.ROUNDING:
        return f"**no**: {told}; {len(cells)} cells"
    interval = f"ahead by {lead.value:.2f} [{lead.low:.2f}, {lead.high:.2f}]"
    return f"{_claim(lead.above())}: {told}; {interval}, {len(cells)} cells"


def gain(own: Scores, than: str) -> str:
    """Target (c): in each cell the ratio of mean scores, with its interval."""
    told, reached, proven = [], [], []
    for cell, found in own.items():
        if cell.regime.split("-")[0] not in DIFFER:
            continue
        if than not in found or not found[than].keys() & found[DEFAULT].keys():
            told.append(f"{cell.name} has no run of equal steps to compare with")
            continue
        over = times(found[DEFAULT], found[than])
        reached.append(over.value >= GAIN)
        proven.append(over.above(GAIN))
        told.append(f"{cell.name} {over.value:.2f} [{over.low:.2f}, {over.high:.2f}]")
    if not reached:
        return f"not compared: {'; '.join(told)}" if told else NONE
    verdict = _claim(all(proven)) if all(reached) else "**no**"
    return (
        f"{verdict}: reached in {sum(reached)} of {len(reached)} cells, shown by the interval in "
        f"{sum(proven)}; {', '.join(told)}"
    )


def below(own: Scores) -> str:
    """Target (d)."""
    some = {cell: found for cell, found in own.items() if "local" in found}
    if not some:
        return NONE
    missed = [
        f"{cell.name} {_lead(difference(found[DEFAULT], found['local']))}"
        for cell, found in some.items()
        if ranking.beats(found["local"], found[DEFAULT])
    ]
    return _of(len(some) - len(missed), len(some), "cells", "below in", missed)


def lowest(own: Scores, worst: Values) -> str:
    """Target (e), over the cells with the same algorithms. The unit is a run (cell, seed)."""
    names, cells = ranking.block(own)
    if DEFAULT not in names or len(names) < 2:
        return "no cells with the same algorithms yet"
    found = {
        name: {(c.name, seed): v for c in cells for seed, v in worst[c][name].items()}
        for name in names
    }
    found = ranking.common(found)
    order = sorted(found, key=lambda name: -mean(found[name].values()))
    told = ", ".join(f"`{name}` {percent(mean(found[name].values()))}" for name in order[:3])
    other = next(name for name in order if name != DEFAULT)
    lead = difference(found[DEFAULT], found[other])
    verdict = "**no**" if lead.value <= 0 else _claim(lead.above())
    return f"{verdict}: {told}; {shown(lead)} to `{other}`, {lead.pairs} runs"


def length() -> str:
    """Target (f)."""
    lines, code = lines_of(SOURCE.read_text(encoding="utf-8"))
    return (
        f"{_yes(2 * lines <= BEFORE[0])}: {lines} lines, {code} of them code "
        f"(0.1.0: {BEFORE[0]} and {BEFORE[1]})"
    )


def lines_of(source: str) -> tuple[int, int]:
    """The lines of a Python file, and those of code: no docstring, comment or empty line."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            texts |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    layout.add(tokenize.ENDMARKER)
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(source.splitlines()), len(code - texts)


def _lead(lead: Estimate) -> str:
    return f"{shown(lead)} ± {100 * lead.error:.1f}"


def _of(reached: int, all_: int, kind: str, verb: str, missed: Sequence[str]) -> str:
    rest = f"; {verb} {', '.join(missed)}" if missed else ""
    return f"{_yes(not missed)}: {reached} of {all_} {kind}{rest}"


def _claim(proven: bool) -> str:
    return "yes" if proven else f"yes, but {UNPROVEN}"


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"

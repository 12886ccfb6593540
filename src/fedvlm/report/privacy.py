"""The privacy of a run: its guarantee, what the guarantee covers and what not, and its audit.

Numbers come from ``privacy.json``, ``metrics.jsonl`` and ``audit.json`` alone. No epsilon is given
for a model whose training had a path without noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedvlm.after.audit import READING, VIEWS, verdict
from fedvlm.figures.series import capital
from fedvlm.privacy import statement
from fedvlm.report import charts
from fedvlm.report.folder import Compared, Run
from fedvlm.report.parts import Chart, Code, Items, Part, Section, Table, Terms, Text, table

NAME, TITLE = "privacy", "Privacy"
EPSILON = (
    "Differential privacy limits how much a result can depend on one unit, such as one row. "
    "Epsilon is the limit: with a small epsilon, the result would be nearly as likely without the "
    "unit. An epsilon of 1 is strong, 3 is usual, and above 8 the promise says little. Delta is "
    "the probability with which the limit may fail."
)
AUC = (
    "AUC: the chance that a canary that was trained on scores higher than one that was not; 0.5 is "
    "no better than a coin"
)
AGAIN = """\
import json
from fedvlm.privacy.accountant import Spend, epsilon

about = json.load(open("privacy.json"))
lines = [json.loads(line) for line in open("metrics.jsonl")]
{count}
print(max(
    epsilon([Spend(c["expected_batch"] / c["units"], c["noise"], steps[name])], about["delta"])
    for name, c in about["clients"].items()
))"""
EACH = """\
steps = {name: sum(line.get("steps", {}).get(name, 0) for line in lines)
         for name in about["clients"]}"""
POOLED = """\
whole = sum(sum(line.get("steps", {}).values()) for line in lines)
steps = dict.fromkeys(about["clients"], whole)"""
ROUNDS = """\
rounds = sum(0 < line["round"] <= about["rounds"] for line in lines)
steps = dict.fromkeys(about["clients"], rounds)"""


def of_run(run: Run) -> Section:
    """The privacy of a run."""
    parts: list[Part] = [Text("Differential privacy", "head"), *_differential(run)]
    parts += [Text("Secure aggregation", "head"), *_secure(run)]
    if audit := list(_audit(run)):
        parts += [Text("Audit", "head"), *audit]
    return Section(NAME, TITLE, parts)


def _differential(run: Run) -> Iterator[Part]:
    about, asked = run.privacy, run.config.privacy
    if about is None and asked.unit is None:
        yield Text(
            "There was no differential privacy. What leaves a site are LoRA factors and numbers, "
            "never a row. Factors can still reveal something about the rows that they were trained "
            "on, and no limit is proven here."
        )
        return
    yield Text(EPSILON)
    if about is None:
        yield Text(
            f"The run asks for differential privacy (unit: {statement.unit(str(asked.unit))}). "
            "Each site adds the noise and keeps its own account, which only the site has: fedvlm "
            "site budget prints it there. The server's folder holds no account, so this report "
            "gives no epsilon."
        )
        return
    yield from _guarantee(run, about)


def _guarantee(run: Run, about: Mapping[str, Any]) -> Iterator[Part]:
    spent = [(int(line["round"]), line["epsilon"]) for line in run.lines if "epsilon" in line]
    last = spent[-1][1] if spent else 0.0
    yield Text(f"Simulated guarantee: {statement.guarantee(about, last)}.", "strong")
    yield Terms(
        {
            "Unit": statement.unit(about["unit"]),
            "Neighbours": about["adjacency"],
            "Sampling": f"{about['sampling']}: a step takes each unit independently of the others",
            "Accountant": about["accountant"],
            "Delta": f"{about['delta']:g}",
            "Epsilon so far": f"{last:.4g} after round {run.round}",
            "Budget": "none: the noise was set by hand"
            if about["epsilon"] is None
            else f"epsilon {about['epsilon']:.4g} for the whole run",
            "Mechanism": statement.mechanism(about),
        }
    )
    yield _covered(about)
    if loud := statement.loud(about):
        yield Text(f"{capital(loud)}.", "warning")
    if spent:
        values = [{"round": 0, "series": "epsilon", "value": 0.0}]
        values += [{"round": r, "series": "epsilon", "value": v} for r, v in spent]
        spec = charts.curves(values, ("epsilon",), "epsilon", False, limit=about["epsilon"])
        note = "The dashed line is the budget. " if about["epsilon"] is not None else ""
        yield Chart(spec, "Epsilon so far, by round", f"{note}{charts.BESIDE}")
        so_far = [(str(r), f"{v:.4f}") for r, v in spent]
        head = ("round", "epsilon so far")
        title = "The largest epsilon of a site"
        yield table(title, head, so_far, more="metrics.jsonl", folded=True)
    plans = [
        (
            name or "all sites together",
            f"{plan['units']:,}",
            f"{plan['expected_batch']:,}",
            f"{plan['noise']:.4f}",
            f"{plan['steps']:,}",
        )
        for name, plan in about["clients"].items()
    ]
    heads = ("site", "units", "expected in a step", "noise", "planned steps")
    yield table("What epsilon is computed from", heads, plans, more="privacy.json")
    yield Items(statement.not_covered(about), "What the guarantee does not cover")
    yield Code(_again(run, about), "Compute epsilon again, in the folder of the run", folded=True)


def _again(run: Run, about: Mapping[str, Any]) -> str:
    """Code that computes the last epsilon from the files of the run."""
    from fedvlm.algorithms.table import find

    if about["unit"] == "client":
        count = ROUNDS
    else:
        count = POOLED if find(run.config.algorithm.name).pools else EACH
    return AGAIN.replace("{count}", count)


def _covered(about: Mapping[str, Any]) -> Table:
    """What the epsilon holds for."""
    if about["unit"] == "client":
        rows = [
            ("global model", "yes"),
            ("everything that the server sends", "yes"),
            ("personal models", "no: they have no noise and must stay with their sites"),
            ("uploads of one site", "no: the server adds the noise, and sees them without it"),
        ]
    else:
        rows = [
            ("uploads to the server", "yes"),
            ("global model", "yes"),
            ("personal models", "yes"),
        ]
    rows += [
        ("scores, losses and answers in this report", "no: they have no noise"),
        ("held-out rows", "no: they are scored and never trained on"),
    ]
    return table("What the guarantee covers", ("", "covered"), rows, texts=(1,))


def _secure(run: Run) -> Iterator[Part]:
    """Secure aggregation, by round."""
    if not run.config.wire.secure:
        yield Text(
            "It was off: the server sees the upload of each site."
            if run.deployed
            else "It was off. In a run over real machines, the server would see the upload of each "
            "site."
        )
        return
    told = [line for line in run.lines if "secure" in line]
    void = [line for line in told if "void" in line["secure"]]
    yield Text(
        "It was on: the server opens the sum of at least three sites' uploads, "
        "and no single upload."
        if run.deployed
        else "It was simulated: the messages were made in one process, so nothing "
        "was hidden from that process."
    )
    rows = [
        (
            str(line["round"]),
            str(len(line["secure"].get("clients", ()))),
            str(line["secure"].get("void", "")),
        )
        for line in told
    ]
    heads = ("round", "sites in the sum", "void because")
    if rows:
        yield table("Secure sums", heads, rows, texts=(2,), more="metrics.jsonl", folded=not void)


def _audit(run: Run) -> Iterator[Part]:
    """The audit of the run by canaries."""
    planted = run.config.privacy.canaries
    if run.audit is None:
        if planted:
            yield Text(
                f"The run has {planted} canaries: rows with wrong answers, half of them trained "
                f"on. An audit of the run has not been made: fedvlm audit {run.folder.name}",
                "note",
            )
        return
    yield Text(
        "An audit has attacked the run's models. It planted canaries, which are rows with wrong "
        "answers, and trained on half of them, chosen by coin. Then two attackers guessed which. "
        "The better they guess, the higher the epsilon that the run must have had."
    )
    rows = [
        (
            view,
            attack,
            str(one.canaries),
            f"{one.best.right} of {one.best.guesses}",
            f"{one.best.epsilon:.2f}",
            f"{one.auc:.3f}",
        )
        for view, attacks in run.audit.views.items()
        for attack, one in attacks.items()
    ]
    heads = ("view", "attack", "canaries", "right guesses", "epsilon at least", "AUC")
    title = "Lower bounds of epsilon at 95 %, from one run"
    yield table(title, heads, rows, texts=(1,), more="audit.json")
    broken = run.audit.broken
    lines = [f"{capital(text)}." for text in (*verdict(run.audit), *READING, AUC)]
    yield Items(lines, "What the audit shows")
    if broken:
        yield Text(f"The guarantee is broken: {', '.join(broken)}.", "warning")
    if lacking := [view for view in VIEWS if view not in run.audit.views]:
        yield Text(f"Not attacked, as the run has none: {', '.join(lacking)}.", "note")


def of_comparison(found: Compared) -> Section:
    """The privacy of the runs of a comparison."""
    private = [(n, r) for n, runs in found.runs.items() for r in runs if r.privacy is not None]
    if not private:
        return Section(NAME, TITLE, list(_differential(found.first)))
    about = private[0][1].privacy or {}
    rows = [
        (
            name,
            str(run.config.seed),
            f"{_spent(run.lines):.4g}",
            f"{(run.privacy or {})['delta']:g}",
        )
        for name, run in private
    ]
    parts: list[Part] = [
        Text(EPSILON),
        Text(
            f"Each run has a simulated guarantee of its own; unit: {statement.unit(about['unit'])}."
        ),
        table("Epsilon of each run alone", ("algorithm", "seed", "epsilon", "delta"), rows),
        Text(
            "All runs used the same rows, so their epsilons add up. No single number above holds "
            "for whoever sees all of these models.",
            "warning",
        ),
        _covered(about),
        Items(statement.not_covered(about), "What the guarantees do not cover"),
        Text("The report of each run, in its own folder, has the numbers behind its epsilon."),
    ]
    return Section(NAME, TITLE, parts)


def _spent(lines: Sequence[Mapping[str, Any]]) -> float:
    return next((line["epsilon"] for line in reversed(lines) if "epsilon" in line), 0.0)

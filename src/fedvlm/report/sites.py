"""How the sites differ, and what the run cost: bytes, time, memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedvlm.algorithms.table import find
from fedvlm.data.partition import SPLITS, Partition
from fedvlm.errors import brief, counted
from fedvlm.metrics import size
from fedvlm.report import charts
from fedvlm.report.folder import Compared, Run
from fedvlm.report.parts import Chart, Items, Part, Section, Text, table
from fedvlm.store.run import SITES

USES = {"train": "training", "val": "validation", "test": "held out"}
OTHERS = "all others"
WAYS = {"bytes_up": "sent to the server", "bytes_down": "received"}


def of_run(run: Run) -> Section:
    """The rows of the sites, and how their labels differ."""
    title = "How the sites differ"
    if run.partition is None:
        return Section("sites", title, _told(run))
    partition = run.partition
    names = charts.labels(partition.clients)
    counts = partition.counts()
    values = [
        {"site": label, "series": USES[split], "value": counts[site][split]}
        for site, label in names.items()
        for split in SPLITS
    ]
    note = f"{charts.BESIDE}{charts.rest(partition.clients)}"
    uses = list(USES.values())
    spec = charts.bars(values, uses, "rows")
    parts: list[Part] = [Chart(spec, "Rows of each site", note, charts.bar_keys(uses))]
    if partition.frequent:
        parts.append(_labels(partition, names))
    parts.append(_table(partition))
    column = "answers" if partition.label == "answer" else f"values of '{partition.label}'"
    parts.append(
        Text(
            f"Divergence measures how much the {column} of a site differ from those of all sites: "
            "0 is no difference, 1 the largest possible one (Jensen-Shannon divergence, base 2). "
            f"Its mean over the sites is {partition.mean_divergence():.3f}. Rows were assigned to "
            f"the sites by partition.kind={partition.kind}.",
            "note",
        )
    )
    return Section("sites", title, parts)


def _told(run: Run) -> list[Part]:
    """What the server knows of deployed sites."""
    parts: list[Part] = [
        Text(
            "The sites keep their rows. The server knows none of them, nor their labels, so this "
            "report cannot show how the sites differ. Each site sees its own rows on its machine."
        )
    ]
    path = run.folder / SITES
    rows = json.loads(path.read_bytes())["rows"] if path.exists() else {}
    if rows:
        told = [(site, *(f"{counts[s]:,}" for s in SPLITS)) for site, counts in rows.items()]
        title = "Numbers of rows that the sites report"
        parts.append(table(title, ("site", *USES.values()), told, more=SITES))
    return parts


def _labels(partition: Partition, names: Mapping[str, str]) -> Chart:
    """The shares of the frequent labels within each site."""
    labels = {text: brief(text, 20) for text in partition.frequent}
    order = list(dict.fromkeys(labels.values()))
    values = []
    for site, label in names.items():
        total = len(partition.splits[site])
        found: Counter[str] = Counter()
        for text, count in zip(partition.frequent, partition.skew[site].counts, strict=True):
            found[labels[text]] += count
        found[OTHERS] += total - sum(found.values())
        values += [{"site": label, "label": t, "value": n / total} for t, n in found.items()]
    order.append(OTHERS)
    what = "answers" if partition.label == "answer" else f"values of '{brief(partition.label, 40)}'"
    note = "A darker square is a larger share. The table has the most frequent ones in numbers."
    return Chart(charts.shares(values, order), f"Shares of frequent {what} within each site", note)


def _table(partition: Partition) -> Any:
    rows = []
    for site in partition.clients:
        split, skew = partition.splits[site], partition.skew[site]
        often = ", ".join(f"{brief(t, 30)} {100 * n / len(split):.0f} %" for t, n in skew.top[:3])
        counts = [str(len(getattr(split, name))) for name in SPLITS]
        rows.append((site, *counts, f"{skew.divergence:.3f}", often))
    heads = ("site", *USES.values(), "divergence", "most frequent")
    title = "Rows of each site"
    return table(title, heads, rows, texts=(5,), more="partition.json")


def costs_of_run(run: Run) -> Section:
    """Bytes by site, seconds and memory by round."""
    title, name = "What was sent, time and memory", "costs"
    if find(run.config.algorithm.name).pools:
        none = Text("All rows were in one place, so nothing was sent to a server.")
        return Section(name, title, [none, Items(list(_time(run)), "Time and memory")])
    sent = {way: Counter[str]() for way in WAYS}
    for line in run.lines:
        for way, total in sent.items():
            total.update(line.get(way, {}))
    parts: list[Part] = []
    if any(total.total() for total in sent.values()):
        names = charts.labels(run.clients)
        values = [
            {"site": label, "series": head, "value": sent[way][site]}
            for site, label in names.items()
            for way, head in WAYS.items()
        ]
        spec = charts.bars(values, list(WAYS.values()), "bytes", unit="~s", beside=True)
        note = f"k: thousand bytes, M: million bytes. {charts.BESIDE}{charts.rest(run.clients)}"
        keys = charts.bar_keys(list(WAYS.values()))
        parts.append(Chart(spec, "Bytes of each site in the whole run", note, keys))
        rows = [
            (site, *(size(sent[way][site]) for way in WAYS), str(_rounds(run, site)))
            for site in run.clients
        ]
        ending = run.round > run.config.train.rounds
        foot = [("all sites", *(size(sent[way].total()) for way in WAYS), "")]
        heads = ("site", *WAYS.values(), "rounds, with the ending" if ending else "rounds")
        told = "Bytes of each site: LoRA factors, without the overhead of the network"
        parts.append(table(told, heads, rows, foot=foot, more="metrics.jsonl"))
    else:
        parts.append(Text("Nothing was sent between the sites and a server."))
    parts.append(Items(list(_time(run)), "Time and memory"))
    if run.opened:
        from fedvlm.after.card import what_left

        parts.append(
            Items(
                [line.replace("`", "") for line in what_left(run.opened, None)],
                "What left the sites, and what stayed",
            )
        )
    return Section(name, title, parts)


def _rounds(run: Run, site: str) -> int:
    return sum(site in line.get("cohort", ()) for line in run.lines)


def _time(run: Run) -> Sequence[str]:
    seconds = [line["seconds"] for line in run.timing if "seconds" in line]
    if seconds:
        yield_ = [
            f"{duration(sum(seconds))} for {counted(len(seconds), 'round')}, scoring included."
        ]
    else:
        yield_ = ["The seconds of the rounds are not known (timing.jsonl)."]
    steps = sum(sum(line.get("steps", {}).values()) for line in run.lines)
    if steps:
        yield_.append(f"{steps:,} optimizer steps of all sites together.")
    whose = "the server's process" if run.deployed else "the process, which played all sites"
    for key, what in (("memory", "main memory"), ("device_memory", "memory of the graphics card")):
        if known := [line[key] for line in run.timing if key in line]:
            yield_.append(f"At most {size(max(known))} of {what}, by {whose}.")
    if not any("memory" in line for line in run.timing):
        yield_.append("The memory is not known: this run has not recorded it.")
    return yield_


def costs_of_comparison(found: Compared) -> Section:
    """Bytes, steps and seconds by algorithm."""
    rows = [
        (
            row["algorithm"],
            size(row["bytes_up"]),
            size(row["bytes_down"]),
            f"{row['steps']:,.0f}" if row.get("steps") else "unknown",
            f"{row['passes']:,.0f}" if row.get("passes") else "unknown",
            duration(row["seconds"]),
        )
        for row in found.rows
    ]
    heads = ("algorithm", *WAYS.values(), "optimizer steps", "forward passes", "time")
    title = "Totals of all sites and rounds, means over seeds"
    told = Text(
        "Forward passes count rows: a row that goes through the model once is one pass. The "
        "report of each run, in its own folder, has bytes and time by site and round.",
        "note",
    )
    return Section("costs", "What was sent, and time", [table(title, heads, rows), told])


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

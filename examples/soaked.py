"""The tables, the plot and the verdict of ``soak.py``, from the files that it wrote.

    python examples/soaked.py FOLDER

A role, such as the worker of a site, has had many processes, because faults end them. The slope of
its memory is the median of the slopes between any two samples of one process that are at least
five minutes apart, without the first five minutes of each process (Theil and Sen). So neither a
restart nor a single step moves it. Growth is a slope of more than 5 % of the role's median memory,
and more than 4 MiB, in an hour; of handles, more than one in an hour. Threads are shown only:
NVFlare keeps one for every message of the last minute, so that their number follows the pace.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from fedvlm.store.run import Store

COLUMNS = ("time", "service", "role", "process", "age", "rss", "handles", "threads", "processor")
WARM, APART = 300.0, 300.0  # seconds
SHARE, LEAST = 0.05, 4.0  # of the median memory, and MiB, in an hour
MORE = 1.0  # handles in an hour
MIB = 2.0**20
FADED = ("site: check", "other")


def slope(lives: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The slope in an hour of values over times in seconds, within lives; NaN without any."""
    found = []
    for times, values in lives:
        first, second = np.triu_indices(len(times), 1)
        apart = times[second] - times[first]
        far = apart >= APART
        found.append((values[second] - values[first])[far] / apart[far])
    all_of = np.concatenate(found) if found else np.array([])
    return float(np.median(all_of)) * 3600 if len(all_of) else float("nan")


def verdict(tilt: float, bound: float, handles: float) -> str:
    """Whether memory, in MiB, and handles are flat."""
    if tilt > bound or handles > MORE:
        return "no"
    return "too short" if np.isnan(tilt) else "yes"


def grown(samples: pd.DataFrame) -> pd.DataFrame:
    """A row for every role: its processes, memory, handles and threads, and their slopes."""
    rows = []
    for role, own in samples[~samples["role"].isin(FADED)].groupby("role"):
        old = own[own["age"] > WARM]
        lives = [life for _, life in old.groupby(["service", "process"])]

        def per_hour(what: str, lives: list[pd.DataFrame] = lives) -> float:
            return slope([(life["time"].to_numpy(), life[what].to_numpy()) for life in lives])

        size = own["rss"] / MIB
        middle = float((old if len(old) else own)["rss"].median()) / MIB
        tilt = per_hour("rss") / MIB
        more = {what: per_hour(what) for what in ("handles", "threads")}
        bound = max(SHARE * middle, LEAST)
        span = own.groupby(["service", "process"])["processor"].agg(lambda v: v.max() - v.min())
        rows.append(
            {
                "role": role,
                "processes": own.groupby(["service", "process"]).ngroups,
                "oldest, min": round(own["age"].max() / 60),
                "MiB": round(middle),
                "at most": round(size.max()),
                "MiB in an hour": round(tilt, 1),
                "handles": int(own["handles"].median()),
                "handles, at most": int(own["handles"].max()),
                "handles in an hour": round(more["handles"], 1),
                "threads": int(own["threads"].median()),
                "threads in an hour": round(more["threads"], 1),
                "processor s": round(span.sum()),
                "flat": verdict(tilt, bound, more["handles"]),
            }
        )
    return pd.DataFrame(rows)


def written(table: pd.DataFrame) -> list[list[Any]]:
    """The cells of a table in Markdown."""
    return [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]


def drawn(samples: pd.DataFrame, seen: list[dict[str, Any]], path: Path) -> None:
    """Memory and handles of every process over time, with the faults."""
    begin = next(e["time"] for e in seen if e["event"] == "begun")
    roles = [r for r in sorted(set(samples["role"])) if r not in FADED]
    figure, axes = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    for k, role in enumerate(roles):
        own = samples[samples["role"] == role]
        for number, (_, life) in enumerate(own.groupby(["service", "process"])):
            minutes = (life["time"] - begin) / 60
            style = {"color": f"C{k}", "lw": 0.9, "label": None if number else role}
            axes[0].plot(minutes, life["rss"] / MIB, **style)
            axes[1].plot(minutes, life["handles"], **style | {"label": None})
    marks = {
        "kill": ("C3", "site killed"),
        "stall": ("0.6", "site stopped"),
        "server": ("k", "server killed"),
    }
    for event in seen:
        if event["event"] == "fault":
            for axis in axes:
                at = (event["time"] - (event["back"] or 0) - begin) / 60
                axis.axvline(at, color=marks[event["kind"]][0], lw=0.6, ls=":")
    for colour, name in marks.values():
        axes[1].plot([], [], color=colour, ls=":", label=name)
    axes[0].set_ylabel("resident memory, MiB")
    axes[1].set_ylabel("open handles")
    axes[1].set_xlabel("minutes")
    figure.legend(fontsize=8, ncols=4, loc="outside upper center")
    for axis in axes:
        axis.set_ylim(0)
    figure.savefig(path, dpi=80)


def told(seen: list[dict[str, Any]], lines: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The faults in words, and what is wrong with rounds and recoveries."""
    faults = [e for e in seen if e["event"] == "fault"]
    begun = next(e for e in seen if e["event"] == "begun")
    text, wrong = [], []
    for kind in ("kill", "stall", "server"):
        backs = [e["back"] for e in faults if e["kind"] == kind]
        known = sorted(b for b in backs if b is not None)
        middle = f"{np.median(known):.0f} s, at most {known[-1]:.0f} s" if known else "none"
        text.append(f"{kind}: {len(backs)}; all sites in a sum again after {middle} (median)")
        if len(known) < len(backs):
            wrong.append(f"{len(backs) - len(known)} faults of '{kind}' without recovery")
    numbers = [line["round"] for line in lines]
    if numbers != list(range(begun["rounds"] + 2)):
        wrong.append(f"rounds {numbers[:3]} ... {numbers[-3:]}, {len(numbers)} lines")
    secure = [line["secure"] for line in lines if "secure" in line]
    voids = Counter(s["void"] for s in secure if s.get("void"))
    clients = Counter(len(s["clients"]) for s in secure if not s.get("void"))
    text.append(f"rounds: {begun['rounds']}; by sites in the sum: {dict(sorted(clients.items()))}")
    text.append(f"void: {dict(voids) or 'none'}")
    ended = [e for e in seen if e["event"] == "ended"]
    paused = [e["seconds"] for e in seen if e["event"] == "suspended"]
    text.append(f"without samples, because the machine was stopped or too busy: {paused} s")
    text.append(f"services that ended by themselves: {[(e['service'], e['code']) for e in ended]}")
    if not any(e["event"] == "done" and e["finished"] for e in seen):
        wrong.append("the run is not finished")
    return "\n".join(text), wrong


def main(home: Path) -> None:
    seen = json.loads((home / "faults.json").read_text())
    samples = pd.read_csv(home / "samples.csv")
    samples = samples[samples["rss"] > 0]  # not of a process that has ended, before it is reaped
    run = Store(home / "run")
    table = grown(samples)
    drawn(samples, seen, home / "soak.png")
    text, wrong = told(seen, run.lines())
    print(text)
    seconds = samples["time"].max() - samples["time"].min()
    used = table["processor s"].sum()
    print(f"{seconds / 60:.0f} min, {used / seconds:.2f} of one core on average")
    for path in ("run/adapters/global", *(f"sites/site-{k}" for k in range(5))):
        models = list((home / path).rglob("adapter_model.safetensors"))
        if not [m for m in models if m.parent.name != "initial"]:
            wrong.append(f"no model in {path}")
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in written(table)))
    wrong += [f"{row.role} grows" for row in table.itertuples() if row.flat == "no"]
    if wrong:
        raise SystemExit("\n".join(["not as expected:", *wrong]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

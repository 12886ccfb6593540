"""The model card of an export: model, training, scores, and the data that left the site.

A card holds only numbers that the run has already written, and no row of anyone's data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm.after.loading import parted
from fedvlm.errors import visible
from fedvlm.figures.series import capital
from fedvlm.intervals import few_rows, mean_interval, scored
from fedvlm.metrics import METRICS
from fedvlm.privacy import statement
from fedvlm.rounds.results import of_all
from fedvlm.settings.sections import Config
from fedvlm.tree import Tree, factor, module

if TYPE_CHECKING:
    from fedvlm.after.opened import Opened

Scored = dict[str, tuple[float | None, list[float] | None]]
"""Metric -> score and interval."""

Stages = Mapping[str, Scored]

NO_ROWS = (
    "This card holds counts and scores, and no row of data. LoRA factors can still reveal "
    "something about the rows that they were trained on."
)
LICENCE = (
    "## Licence\n\nThis card sets no licence. Choose one before you publish the model, within the "
    "licences of the base model and of the data.\n"
)
STAGES = {
    "untuned": "before training",
    "global": "the global model",
    "shared": "the shared model, as downloaded",
    "alone": "trained alone, the same steps",
    "personal_before": "personal, before the last aggregation",
    "personal": "**personal**",
}


def front_matter(base: str | None, *, merged: bool) -> str:
    """The YAML block that the hub reads. It has no licence: the publisher chooses one.

    Args:
        base: the base model; None: a model that the hub does not have.
        merged: whether the card belongs to a whole model.
    """
    from huggingface_hub import ModelCardData

    name = base and parted(base)[0]
    tags = [] if merged or not name else [f"base_model:adapter:{name}"]
    head = ModelCardData(
        base_model=name,
        base_model_relation=("finetune" if merged else "adapter") if name else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="image-text-to-text",
        tags=[*tags, "lora", "federated-learning", "vision-language", "fedvlm"],
    )
    local = base is not None and Path(base).is_absolute()
    note = "# base_model is a folder: put a hub name before you publish this card\n" * local
    return f"---\n{note}{head.to_yaml()}\n---\n"


def text(
    title: str,
    facts: Mapping[str, str],
    scores: Mapping[str, Stages],
    privacy: Sequence[str],
    loading: str,
    head: str,
    warnings: Sequence[str] = (),
    guarantee: Sequence[str] = (),
) -> str:
    """A card from its parts; ``scores`` maps table title -> stage -> its scores."""
    parts = [f"{head}\n# {title}\n"]
    parts.append(
        "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in facts.items())])
    )
    parts.append("\n## Scores\n")
    for name, stages in scores.items():
        parts.append(f"{name}:\n\n{_scores(stages)}\n")
    parts.append("In brackets: 95 % intervals, of means over clients by Student's t.\n")
    parts.extend(f"**{capital(warning)}.**\n" for warning in warnings)
    parts.append("## What left the site\n\n" + "\n".join(f"- {line}" for line in privacy) + "\n")
    if guarantee:
        lines = "\n".join(f"- {line}" for line in guarantee)
        parts.append(f"## Differential privacy\n\n{lines}\n")
    parts.append(f"## How to load it\n\n{loading}\n")
    parts.append(LICENCE)
    return "\n".join(parts)


def of_run(run: Opened, client: str | None, *, base: str, tree: Tree, loading: str, merged: bool):
    """The card of a client's model, or of the global model (``client`` is None)."""
    config, table = run.config, run.results.table
    whose = "the global model" if client is None else f"the model of client {code(client)}"
    counts = {} if run.deployed else run.partition.counts()
    kept = [client] if client is not None else list(counts)
    rows = {k: sum(counts[c][k] for c in kept) for k in ("train", "val", "test")}
    known = (
        {
            "partition": run.partition.kind,
            "data": _source(config),
            "rows" if client else "rows, all clients": _rows(rows),
        }
        if counts
        else {"data": "at the sites"}
    )
    facts = {
        "base model": f"`{base}`",
        **training(config, tree),
        "clients": of_all(run.clients, counts or run.clients),
        **known,
    }
    scored_rows = {
        c: s["examples"]
        for c, s in table["models"]["personal"]["clients"].items()
        if "examples" in s and client in (None, c)
    }
    tables = _of_all(table) if client is None else _of_client(run, client)
    title = f"LoRA by fedvlm: {whose}" if not merged else f"Fine-tuned by fedvlm: {whose}"
    head = front_matter(_of_hub(base), merged=merged)
    warnings = [few] if (few := few_rows(scored_rows, named=False)) else []
    if planted := config.privacy.canaries:
        warnings.append(
            f"An experiment: {planted} canaries, half of them trained with wrong answers"
        )
    left = [*what_left(run, client), NO_ROWS]
    return text(title, facts, tables, left, loading, head, warnings, guarantee(table))


def of_site(
    run: Opened, told: Mapping[str, Any], *, base: str, tree: Tree, loading: str, merged: bool
) -> str:
    """The card of a site that joined after training; ``told`` is its ``scores.json``."""
    facts = {
        "base model": f"`{base}`",
        **training(run.config, tree),
        "joined after training": f"up to {told['steps']} steps, on {told['trained']}",
        "data": told["data"],
        "rows": _rows(told["rows"]),
    }
    privacy = [
        "Nothing. The site downloaded the shared factors, and trained and scored on its own.",
        "This folder holds factors that were trained on the site's rows. Whoever publishes the "
        "folder publishes them.",
    ]
    rows = int(told["scores"]["personal"]["examples"])
    own = {m: _paired(s, told.get("intervals", {}).get(m, {})) for m, s in told["scores"].items()}
    scores = {f"On the site's own {rows} {told['split']} rows": own}
    few = few_rows({told["site"]: rows}, named=False)
    title = ("Fine-tuned" if merged else "LoRA") + f" by fedvlm: site {code(told['site'])}"
    head = front_matter(_of_hub(base), merged=merged)
    return text(title, facts, scores, privacy, loading, head, [few] if few else [])


# -- parts


def code(name: str) -> str:
    """A name as code in Markdown; nothing in it is syntax."""
    text = visible(name)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    room = " " * (len(fence) > 1 or text != text.strip())
    return f"{fence}{room}{text}{room}{fence}"


def _of_hub(base: str) -> str | None:
    """The base model for the YAML block; None for the model that is bundled with fedvlm."""
    from fedvlm.models.load import BUNDLED

    return None if base in BUNDLED else base


def training(config: Config, tree: Tree) -> dict[str, str]:
    from fedvlm.algorithms.table import find
    from fedvlm.layers import part
    from fedvlm.version import __version__

    modules = sorted({module(name) for name in tree})
    kinds = [part(m) for m in modules]
    where = ", ".join(f"{kinds.count(k)} {k}" for k in ("language", "projector", "vision"))
    entry = find(config.algorithm.name)
    size = sum(t.numel() for t in tree.values())
    return {
        "trained by": f"fedvlm {__version__}, seed {config.seed}",
        "algorithm": f"`{config.algorithm.name}`: {entry.source}",
        "objective": config.objective.name,
        "rounds": str(config.train.rounds),
        "LoRA": f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, target "
        f"`{config.lora.target}`{', rsLoRA' if config.lora.rslora else ''}",
        "adapted layers": f"{len(modules)} ({where}), {size:,} parameters",
    }


def _source(config: Config) -> str:
    path = config.data.path
    if path is None:
        return f"fedvlm's bundled scenes, style `{config.data.scenes.style}`"
    return (
        code(Path(path).name) if Path(path).exists() or path.startswith(("/", ".")) else code(path)
    )


def _rows(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())


def what_left(run: Opened, client: str | None) -> list[str]:
    """The factors that the clients of a run have sent, and those that they have kept."""
    from fedvlm.algorithms.table import find

    entry = find(run.config.algorithm.name)
    up = run.results.table["bytes"]["bytes_up"]["per_client_round"]
    share = getattr(run.config.algorithm, "share", None)
    what = f"{entry.sends}: {share}" if share else entry.sends
    private = run.config.privacy.unit is not None  # then all clients have the same weight
    if entry.pools:
        lines = ["All rows. The model was trained on the rows of all clients in one place."]
    elif up:
        weight = (
            "" if private else " It also sent its number of training rows, its weight in the mean."
        )
        lines = [
            f"A client sent these LoRA factors to the server in a round: {what}. This was "
            f"{up:,.0f} bytes on average.{weight}",
            f"These LoRA factors stayed with the client: {entry.keeps}. Its images, questions and "
            "answers stayed too.",
        ]
    else:
        lines = ["Nothing. Every client trained alone."]
    lines.append(
        "The clients were sites. Each site kept its rows and scored its own models."
        if run.deployed
        else "The run was a simulation: one process read the rows of all clients and scored their "
        "models."
    )
    if client is not None and not entry.pools:
        lines.append(
            "This folder holds the whole adapter, with the factors that stayed with the client. "
            "Whoever publishes the folder publishes them."
        )
    return lines


def guarantee(table: Mapping[str, Any]) -> list[str]:
    """The privacy guarantee of the run, and its limits; empty without one."""
    about = table.get("privacy")
    if about is None:
        return []
    head = statement.guarantee(about, about["spent"])
    return [f"**{head}**.", f"{statement.mechanism(about)}.", *statement.not_covered(about)]


def _of_all(table: Mapping[str, Any]) -> dict[str, Stages]:
    """The scores of the untuned and the global model: means over clients and over rows."""
    heads = {"mean": "interval", "mean_rows": "interval_rows"}
    kinds = {"mean": "mean over clients", "mean_rows": "mean over rows"}
    models = {stage: table["models"][stage]["summary"] for stage in ("untuned", "global")}
    return {
        f"On their own {table['split']} rows, {kinds[mean]}": {
            stage: {m: (s.get(mean), s.get(interval)) for m, s in summary.items()}
            for stage, summary in models.items()
        }
        for mean, interval in heads.items()
    }


def _of_client(run: Opened, client: str) -> dict[str, Stages]:
    """The scores on a client's own rows, and the means over the other clients on theirs."""
    table = run.results.table
    split = table["split"]
    models = {stage: table["models"][stage] for stage in STAGES if stage in table["models"]}
    found: dict[str, Stages] = {}
    if client in run.clients:
        rows = models["personal"]["clients"][client].get("examples", "")
        found[f"On this client's own {rows} {split} rows"] = {
            stage: _paired(m["clients"][client], m.get("intervals", {}).get(client, {}))
            for stage, m in models.items()
        }
    if others := [c for c in run.clients if c != client]:
        found[f"On their own {split} rows, the mean of the other clients"] = {
            stage: _means([model["clients"][c] for c in others]) for stage, model in models.items()
        }
    return found


def _paired(scores: Mapping[str, float], intervals: Mapping[str, list[float]]) -> Scored:
    return {m: (score, intervals.get(m)) for m, score in scores.items() if m in METRICS}


def _scores(stages: Stages) -> str:
    measured = next(iter(stages.values()))
    metrics = [m for m in METRICS if m in measured]
    shown = [METRICS[m].head for m in metrics]
    lines = [f"| model | {' | '.join(shown)} |", "| --- |" + " --- |" * len(metrics)]
    for stage, scores in stages.items():
        numbers = " | ".join(scored(m, *scores[m]) for m in metrics)
        lines.append(f"| {STAGES.get(stage, stage)} | {numbers} |")
    return "\n".join(lines)


def _means(clients: Sequence[Mapping[str, float]]) -> Scored:
    """Means over clients, with their intervals."""
    return {
        m: (
            sum(s[m] for s in clients) / len(clients),
            mean_interval((s[m] for s in clients), METRICS[m].bounds),
        )
        for m in clients[0]
        if m in METRICS
    }


def factors(names: Sequence[str]) -> str:
    """The factors among some names: ``A``, ``B``, or ``A and B``."""
    return " and ".join(sorted({factor(n) for n in names})) or "nothing"

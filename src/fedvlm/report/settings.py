"""The settings of a run, its versions, how to repeat it, and how to cite it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from fedvlm.algorithms.table import OWN, find
from fedvlm.errors import cut
from fedvlm.models.names import HANDED
from fedvlm.report.folder import Compared, Run, data_files, environment
from fedvlm.report.parts import Code, Items, Part, Section, Text, table
from fedvlm.rounds import more
from fedvlm.store.run import CONFIG
from fedvlm.version import __version__

NAME, TITLE = "settings", "Settings, versions, how to repeat and cite"
LONGEST = 60_000  # characters of the settings, which may hold lists of rows
PAPER = (
    "A. Mitra, A. Anjum, P. Agbaje, M. Pesé, H. Olufowobi: FedVLM: Scalable Personalized "
    "Vision-Language Models through Federated Learning. 2025. arXiv:2507.17088"
)


def of_run(run: Run) -> Section:
    """The settings of a run."""
    how: list[Part] = [
        Text("In the folder of the run, this command repeats it in a new folder NEW:"),
        Code(f"fedvlm {'deploy ' * run.deployed}run {CONFIG} output=NEW"),
    ]
    if objects := _objects(run):
        how = [
            Text(
                f"This run had objects of a Python program: fedvlm.run(..., {', '.join(objects)}). "
                "No command repeats it."
            )
        ]
    parts: list[Part] = [
        *how,
        Text(_repeats(run), "note"),
        *_versions(run),
        Code(_config(run), f"All settings ({CONFIG})", folded=True),
        Items(list(_cited([run])), "To cite"),
    ]
    return Section(NAME, TITLE, parts)


def _repeats(run: Run) -> str:
    if run.config.privacy.unit is not None:
        return (
            "The result will differ: noise and samples come from the operating system, because "
            "whoever knew their seed could subtract the noise."
        )
    planned = run.opened.results.table.get("planned") if run.opened else None
    if planned and (why := more.differs(run.config)):
        return (
            f"The result will differ: {why}, and this run was told {planned[0]['rounds']} rounds "
            f"when it began, not {run.config.train.rounds}."
        )
    return (
        "On a processor of the same kind, with the same versions, data and number of threads, the "
        "result is bit-identical. Graphics cards, other processors and other versions round "
        "differently."
    )


def _config(run: Run) -> str:
    return cut((run.folder / CONFIG).read_text(encoding="utf-8"), LONGEST)


def _versions(run: Run) -> Iterator[Part]:
    about = environment(run.folder)
    if not about:
        yield Text("The versions are not known: environment.json is missing.", "warning")
        return
    rows = [(name, str(version)) for name, version in about.get("packages", {}).items()]
    rows.insert(0, ("Python", str(about.get("python", ""))))
    rows += [
        ("system", str(about.get("platform", ""))),
        ("processes, threads", f"{about.get('processes', '')}, {about.get('threads', '')}"),
        ("graphics card", str(about.get("cuda") or "none")),
    ]
    for column, digest in data_files(run.folder).get("columns", {}).items():
        rows.append((f"digest of the data, {column}", digest))
    yield table("Versions, machine and data", ("", ""), rows, texts=(1,), folded=True)


def of_comparison(found: Compared) -> Section:
    """The settings of a comparison."""
    runs = [run for own in found.runs.values() for run in own]
    first = found.first
    commands = [
        f"fedvlm run {shlex.quote(f'{run.folder.name}/{CONFIG}')} "
        f"output={shlex.quote(f'NEW/{run.folder.name}')}"
        for run in runs
        if not _has_own_algorithm(run)
    ]
    parts: list[Part] = [
        Text(
            "Each run has its own folder. In the folder of the comparison, these commands repeat "
            "the runs in a new folder NEW:"
        ),
        Code("\n".join(commands)),
        Text(_repeats(first), "note"),
        *_versions(first),
        Code(_config(first), f"All settings of the run {first.folder.name}", folded=True),
        Items(list(_cited(runs)), "To cite"),
    ]
    return Section(NAME, TITLE, parts)


def _objects(run: Run) -> list[str]:
    """The objects of Python that the run had, as arguments of ``fedvlm.run``."""
    had = {
        "algorithm": _has_own_algorithm(run),
        "metrics": run.config.eval.own,
        "model": run.config.model.name.startswith(HANDED),
    }
    return [f"{name}=..." for name, there in had.items() if there]


def _has_own_algorithm(run: Run) -> bool:
    """Whether the algorithm of the run was an object of Python, which no command can name."""
    return run.config.algorithm.name.partition(":")[0] == OWN


def _cited(runs: list[Run]) -> Iterator[str]:
    made = environment(runs[0].folder).get("packages", {}).get("fedvlm", __version__)
    yield (
        "This software: The fedvlm authors: fedvlm, federated fine-tuning of vision-language "
        f"models with a personal LoRA adapter for every site. Version {made}."
    )
    yield f"The method that fedvlm builds on: {PAPER}"
    for name in dict.fromkeys(run.config.algorithm.name for run in runs):
        yield f"Algorithm {name}: {find(name).source}"

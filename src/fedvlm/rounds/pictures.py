"""The pictures of a run and of a comparison, drawn from their files, again whenever asked.

A picture that cannot be drawn is a warning. It never ends a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm import config as configs
from fedvlm.algorithms.table import OWN
from fedvlm.errors import FedVLMError
from fedvlm.rounds.located import located
from fedvlm.rounds.progress import source
from fedvlm.rounds.results import of_all, optional, scored
from fedvlm.settings.sections import Config
from fedvlm.store import run as stores
from fedvlm.store import sealed

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition

COMPARISON = "comparison.json"
NEITHER = "'{}' holds no run and no comparison; give the folder of one"


def redraw(folder: str | Path) -> list[Path]:
    """Draws the pictures of a run or a comparison again; returns their paths.

    Args:
        folder: the folder of a run, finished or not, or of a comparison.

    Raises:
        FedVLMError: the folder holds neither, or a file of it is damaged.
    """
    path = Path(folder)
    try:
        import matplotlib as _  # noqa: F401
    except Exception as error:  # a broken installation
        raise FedVLMError(f"matplotlib cannot be imported: {error}") from error
    if stores.is_run(path):
        return _redraw_run(path)
    if not (path / COMPARISON).exists():
        raise FedVLMError(NEITHER.format(path))
    runs = runs_of(path, [str(row["algorithm"]) for row in read_comparison(path)["algorithms"]])
    every = [run for found in runs.values() for run in found]
    return [plot_all(path, runs, [settings_of(run) for run in every])]


def read_comparison(folder: Path) -> dict[str, Any]:
    """The content of ``comparison.json``: the lists ``algorithms`` and ``verdicts``.

    Raises:
        FedVLMError: the file is damaged.
    """
    try:
        found = json.loads((folder / COMPARISON).read_bytes())
        for row in found["algorithms"]:
            row["algorithm"]
        found.setdefault("verdicts", [])  # 0.1 has written none
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise sealed.damaged(folder / COMPARISON) from error
    return found


def runs_of(folder: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """Algorithm -> the folders of its finished runs in a comparison.

    Raises:
        FedVLMError: there is none, or one of them is damaged.
    """
    runs: dict[str, list[Path]] = {}
    for name in names:
        found = folder.glob(f"{_escaped(name)}-seed-*")
        runs[name] = sorted(p for p in found if stores.is_done(p))
        for run in runs[name]:
            stores.check_whole(run)
    if not any(runs.values()):
        raise FedVLMError(f"'{folder}' holds no finished run of its comparison")
    return runs


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _redraw_run(folder: Path) -> list[Path]:
    from fedvlm.data.partition import Partition
    from fedvlm.figures import plots, skewplot

    stores.check_whole(folder)
    config, lines, found = settings_of(folder), stores.Store(folder).lines(), []
    names: Sequence[str] = list(lines[0]["evaluation"]["personal"]) if lines else ()
    if partition := Partition.read(folder):
        names = partition.clients
        found.append(skewplot.plot_partition(partition, folder / "partition.png"))
    if _any_score(lines):
        title = _title_of_run(config, names)
        found.append(plots.plot_run(lines, folder / "curves.png", title, metric=config.metric))
    return found


def settings_of(folder: Path) -> Config:
    """The settings of a run, whose algorithm may have been an object."""
    tree, _ = configs.read(folder / stores.CONFIG)
    own = str((tree.get("algorithm") or {}).get("name", "")).partition(":")[0] == OWN
    return (configs.own if own else configs.load)(folder / stores.CONFIG)


def _title_of_run(config: Config, names: Sequence[str]) -> str:
    return f"{config.algorithm.name}, {of_all(scored(config, names), names)}"


def draw_partition(partition: Partition, folder: Path) -> None:
    """Draws ``partition.png``, unless it exists."""
    from fedvlm.figures import skewplot

    if not (folder / "partition.png").exists():
        with optional(f"'{folder / 'partition.png'}'", _again(folder)):
            skewplot.plot_partition(partition, folder / "partition.png")


def draw_curves(
    folder: Path, config: Config, lines: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Draws ``curves.png``, unless no client told its scores."""
    from fedvlm.figures import plots

    if not _any_score(lines):
        return
    with optional(f"'{folder / 'curves.png'}'", _again(folder)):
        title = _title_of_run(config, names)
        plots.plot_run(lines, folder / "curves.png", title, metric=config.metric)


def _any_score(lines: Sequence[Mapping[str, Any]]) -> bool:
    return any((line["evaluation"] or {}).get("personal") for line in lines)


def draw_comparison(
    folder: Path, runs: Mapping[str, Sequence[Path]], settings: Sequence[Config]
) -> None:
    """Draws ``comparison.png``; see :func:`plot_all`."""
    with optional(f"'{folder / 'comparison.png'}'", _again(folder)):
        plot_all(folder, runs, settings)


def plot_all(folder: Path, runs: Mapping[str, Sequence[Path]], settings: Sequence[Config]) -> Path:
    """Draws ``comparison.png`` and returns its path.

    Args:
        folder: the folder of the comparison.
        runs: algorithm -> the folders of its runs.
        settings: the settings of all runs.
    """
    from fedvlm.figures import plots

    lines = {name: [stores.Store(run).lines() for run in found] for name, found in runs.items()}
    seeds, metric = len({config.seed for config in settings}), settings[0].metric
    title = f"{_data(settings[0])}, {seeds} seed{'s' if seeds > 1 else ''}"
    return plots.plot_comparison(lines, folder / "comparison.png", title, metric=metric)


def _data(config: Config) -> str:
    """The data in a few words: of a path its last part, for a picture that others may see."""
    named = source(located(config))
    return Path(named).name if Path(named).is_absolute() else named


def _again(folder: Path) -> str:
    return f"'fedvlm plot {folder}' draws it again"

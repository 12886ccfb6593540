"""Another number of rounds for a run that has begun: ``fedvlm run --resume DIR train.rounds=40``.

A finished run goes on from its state before the ending, and ends again. The rounds are those of a
run that was told the new number from the start, unless something in them depends on that number:
see :func:`differs`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fedvlm import config as configs
from fedvlm import documents
from fedvlm.algorithms.table import find
from fedvlm.errors import ConfigError, shown
from fedvlm.settings.sections import Config
from fedvlm.store import replanned
from fedvlm.store import run as stores

MOVED = ("data.path", "model.name")
"""Settings that a resumed run may change, because files have moved."""
SETTABLE = (*MOVED, "train.rounds")
"""All settings that a resumed run may change."""

logger = logging.getLogger("fedvlm")


def check_moved(overrides: Sequence[str]) -> None:
    """Refuses settings that a resumed run cannot change.

    Raises:
        ConfigError: a setting is not one of ``SETTABLE``.
    """
    fixed = [text for text in overrides if text.partition("=")[0].strip() not in SETTABLE]
    if fixed:
        raise ConfigError(
            [
                f"{shown(text)}: a resumed run keeps its settings; only {' and '.join(MOVED)} can "
                "be given, if the data or the model have moved, and train.rounds"
                for text in fixed
            ]
        )


def rounds_of(folder: Path) -> int:
    """``train.rounds`` of the run in a folder."""
    tree, _ = configs.read(folder / stores.CONFIG)
    return int(tree["train"]["rounds"])


def check(folder: Path, config: Config, ends: bool) -> bool:
    """Whether a run is told another number of rounds than its folder has.

    Args:
        folder: the folder of the run.
        config: its settings, with the new number.
        ends: whether the run has an ending after its rounds, where all clients are scored.

    Raises:
        ConfigError: the run cannot have this number of rounds.
    """
    before, now = rounds_of(folder), config.train.rounds
    if now == before:
        return False
    asked = f"train.rounds={now}"
    if (folder / stores.SITES).exists():
        raise ConfigError(
            [
                f"{asked}: a deployed run keeps its {before} rounds, to which its sites have "
                "agreed; start a new run with output=DIR"
            ]
        )
    if config.privacy.unit is not None:
        raise ConfigError(
            [
                f"{asked}: the noise of this run was chosen for {before} rounds, and its budget "
                "(privacy.epsilon) is for all of them; start a new run with output=DIR"
            ]
        )
    done = replanned.trained(folder)
    if done > before:
        raise ConfigError(
            [
                f"{asked}: the folder '{folder}' has no state before the ending of the run, which "
                "an older version did not keep; start a new run with output=DIR"
            ]
        )
    if now < done:
        raise ConfigError([f"{asked}: the run has done {done} rounds already; give {done} or more"])
    if now == done and not ends and not _scored(folder):
        raise ConfigError(
            [
                f"{asked}: round {done} is done and was not scored (eval.every="
                f"{config.eval.every}), and a run ends with scores; give {done + 1} or more"
            ]
        )
    return True


def replan(store: stores.Store, config: Config, ends: bool) -> None:
    """Takes a run back to the time before its ending if it is told another number of rounds.

    Args:
        store: the folder of the run, locked.
        config: as for :func:`check`.
        ends: as for :func:`check`.

    Raises:
        ConfigError: as :func:`check`.
    """
    if not check(store.folder, config, ends):
        return
    before = rounds_of(store.folder)
    if why := differs(config):
        logger.warning(
            "train.rounds=%d: %s, which counts on all rounds; the rounds so far were made for %d, "
            "so the result is not that of a run of %d rounds",
            config.train.rounds,
            why,
            before,
            config.train.rounds,
        )
    change(store, config.train.rounds)


def change(store: stores.Store, rounds: int, stopped: bool = False) -> None:
    """Writes another number of rounds into a run's settings; see :mod:`fedvlm.store.replanned`.

    Args:
        store: the folder of the run, locked.
        rounds: the new number.
        stopped: whether the rounds end early by themselves (``train.patience``).
    """
    tree, _ = configs.read(store.folder / stores.CONFIG)
    before, tree["train"]["rounds"] = int(tree["train"]["rounds"]), rounds
    replanned.replan(store, documents.write_yaml(tree), before, stopped)


def differs(config: Config) -> str:
    """The setting that makes a round depend on the number of all rounds; empty for most runs."""
    train = config.train
    if train.schedule != "constant":
        return f"the learning rate has train.schedule={train.schedule}"
    if find(config.algorithm.name).pools and train.tuning:
        return f"train.finish_steps={train.tuning} is spread over the rounds of pooled rows"
    return ""


def _scored(folder: Path) -> bool:
    lines = stores.Store(folder).lines()
    return bool(lines) and bool(lines[-1]["evaluation"])

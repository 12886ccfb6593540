"""Checks of a run's settings for its algorithm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedvlm.algorithms.server import ServerConfig
from fedvlm.layers import matcher
from fedvlm.settings.sections import Config

OWN_START = "may begin a round at a client's own factors, not at the download"
VALUES = "uploads factors, not steps from the download"
BY_VALIDATION = "its clients choose by the scores of validation rows, which have no noise"
CONTROLS = "its controls leave the client, and they have no accounting of their own"


def even_rank(config: Config) -> str:
    """Requires an even rank, because the algorithm splits the ranks into halves."""
    rank = config.lora.rank
    return (
        f"it splits the ranks into halves: lora.rank must be even, got {rank}" if rank % 2 else ""
    )


def plain_sgd(config: Config) -> str:
    """Requires plain SGD, because the correction is defined for SGD only."""
    if config.train.optimizer == "sgd":
        return ""
    return "it corrects steps of plain SGD: set train.optimizer=sgd, and a train.lr for SGD"


def validation(config: Config) -> str:
    """Requires validation rows, because the algorithm chooses by them."""
    if config.data.val_fraction:
        return ""
    return (
        "its clients vote with validation rows: data.val_fraction must be above 0"
        " (or choose another algorithm: plora needs no validation rows)"
    )


def own_part(config: Config) -> str:
    """Requires a personal part in both factors."""
    settings: Any = config.algorithm
    if max(settings.mix.values()) < 1:
        return ""
    return "it needs a personal model: algorithm.mix_a and algorithm.mix_b must be below 1"


def share_map(settings: Any, modules: Iterable[str]) -> list[str]:
    """Requires that every pattern of a share map matches an adapted module."""
    modules = list(modules)
    shown = ", ".join(modules[:4])
    return [
        f"algorithm.share: the pattern '{p}' matches none of the {len(modules)} adapted modules, "
        f"such as {shown}"
        for p in settings.share
        if not any(map(matcher(p), modules))
    ]


def general(config: Config, entry: Any) -> list[str]:
    """The problems of a run's settings with its algorithm.

    Args:
        config: the settings of the run; each section is valid by itself.
        entry: the algorithm's row of the table.
    """
    name, lora = config.algorithm.name, config.lora
    wrong = [
        f"lora.{key} has no meaning for algorithm.name={name}; leave it out"
        for key, taken in (("ranks", entry.ranks), ("spare", entry.spare))
        if not taken and getattr(lora, key) is not None
    ]
    server = getattr(config.algorithm, "server", None)
    step = getattr(config.algorithm, "server_lr", 1.0)
    if isinstance(server, ServerConfig) and server.name != "none" and step != 1.0:
        wrong.append(
            f"algorithm.server_lr={step:g} is the step of a plain mean; with "
            f"algorithm.server.name={server.name} set algorithm.server.lr"
        )
    if entry.partial and config.wire.compress == "topk":
        wrong.append(
            "wire.compress=topk sends the rest of an upload in later rounds, but algorithm.name="
            f"{name} {entry.partial}: set wire.compress=int8"
        )
    wrong += [*stopping(config), *private(config, entry)]
    if reason := entry.check(config):
        wrong.append(f"algorithm.name={name}: {reason}")
    return wrong


def stopping(config: Config) -> list[str]:
    """The problems of ``train.patience`` with other settings."""
    asked = f"train.patience={config.train.patience}"
    if config.train.patience is None:
        return []
    wrong = []
    if not config.eval.every:
        wrong.append(f"{asked} counts evaluations, and eval.every=0 makes none: set eval.every=1")
    if not config.data.val_fraction:
        wrong.append(f"{asked} needs validation rows: data.val_fraction must be above 0")
    if config.privacy.unit is not None:
        wrong.append(
            f"{asked} ends a run by the loss on validation rows, which has no noise: leave it out, "
            "or leave out privacy.unit"
        )
    return wrong


def one_place(config: Config, entry: Any) -> list[str]:
    """The settings of a run that sites cannot take part in, as problems.

    Args:
        config: the settings of the run.
        entry: the algorithm's row of the table.
    """
    wrong = []
    if entry.pools:
        wrong.append(
            f"algorithm.name={config.algorithm.name} needs all rows in one place: use fedvlm run"
        )
    if config.train.patience is not None:
        wrong.append(
            f"train.patience={config.train.patience} ends a run by losses on validation rows, "
            "which no site sends: leave it out of a deployed run"
        )
    if config.eval.own:
        wrong.append(
            f"eval.own={list(config.eval.own)}: a function of a Python program does not go to a "
            "site: leave it out of a deployed run"
        )
    return wrong


def private(config: Config, entry: Any) -> list[str]:
    """The problems of a run's settings with differential privacy; none while it is off."""
    name, privacy = config.algorithm.name, config.privacy
    if privacy.unit is None:
        return []
    wrong = []
    if privacy.local and entry.unprotected:
        wrong.append(
            f"algorithm.name={name} cannot run with privacy.unit={privacy.unit}: "
            f"{entry.unprotected}; choose plora, rolora, ffa or local"
        )
    if privacy.local and config.train.local_epochs is not None:
        wrong.append(
            "train.local_epochs makes the number of steps depend on the number of rows, which "
            "privacy.unit protects: set train.local_steps"
        )
    if privacy.unit == "client" and entry.pools:
        wrong.append(f"privacy.unit=client has no meaning for algorithm.name={name}, which pools")
    if privacy.unit == "client" and config.aggregate.kind == "trimmed":
        wrong.append(
            "privacy.unit=client replaces the mean by a noisy mean of clipped changes: leave out "
            "aggregate.kind=trimmed"
        )
    return wrong

"""The table of algorithms: the only place where a name becomes an algorithm."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedvlm.algorithms.base import Algorithm, Client, Phase, State
from fedvlm.algorithms.sharing import sharing, tuned
from fedvlm.errors import ConfigError
from fedvlm.tree import module

if TYPE_CHECKING:
    from fedvlm.sections import AlgorithmConfig

__all__ = ["TABLE", "Algorithm", "Client", "Entry", "Phase", "State", "build", "check_share"]


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        sends: what leaves a client.
        keeps: what is personal and stays.
        source: the paper.
        build: from the config to the algorithm.
    """

    sends: str
    keeps: str
    source: str
    build: Callable[[AlgorithmConfig], Algorithm]


TABLE: dict[str, Entry] = {
    "plora": Entry(
        "B",
        "A",
        "FedVLM, arXiv 2507.17088",
        lambda c: sharing({"": "B"}, server_lr=c.server_lr),
    ),
    "lora": Entry(
        "A and B",
        "nothing",
        "FedIT, arXiv 2305.05644 (FedAvg of both factors)",
        lambda c: sharing({"": "AB"}, server_lr=c.server_lr),
    ),
    "fedsa": Entry(
        "A",
        "B",
        "FedSA-LoRA, arXiv 2410.01463",
        lambda c: sharing({"": "A"}, server_lr=c.server_lr),
    ),
    "ffa": Entry(
        "B",
        "nothing (A is frozen)",
        "FFA-LoRA, arXiv 2403.12313",
        lambda c: sharing({"": "B"}, train="B", server_lr=c.server_lr),
    ),
    "local": Entry(
        "nothing",
        "A and B",
        "training alone, the baseline",
        lambda c: sharing({}),
    ),
    "lora+ft": Entry(
        "A and B",
        "A and B, tuned after the last round",
        "FedAvg + local tuning, arXiv 2108.07313",
        lambda c: tuned(sharing({"": "AB"}, server_lr=c.server_lr), c.ft_steps),
    ),
    "share": Entry(
        "what algorithm.share says",
        "the rest",
        "own map of modules to factors",
        lambda c: sharing(c.share or {}, server_lr=c.server_lr),
    ),
}


def build(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that a config names."""
    return TABLE[config.name].build(config)


def check_share(config: AlgorithmConfig, adapter: Iterable[str]) -> None:
    """Refuses a share map with a pattern that no adapted module has.

    Raises:
        ConfigError: naming the patterns, and some of the modules that exist.
    """
    modules = sorted({module(name) for name in adapter})
    dead = [p for p in config.share or {} if not any(re.search(p, m) for m in modules)]
    if dead:
        shown = ", ".join(modules[:4])
        raise ConfigError(
            [
                f"algorithm.share: the pattern '{p}' matches none of the {len(modules)} adapted "
                f"modules, such as {shown}"
                for p in dead
            ]
        )

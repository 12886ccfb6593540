"""A row of the table of algorithms; other packages can add rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fedvlm.algorithms.base import Algorithm
from fedvlm.settings.method import AlgorithmConfig, LoraConfig
from fedvlm.settings.sections import Config


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        sends: the parts that leave a client, as text.
        keeps: the personal parts that stay, as text.
        source: the paper.
        build: ``(settings, lora) -> algorithm``; the settings are an instance of ``settings``.
        settings: the section ``algorithm`` of a run's configuration, a frozen pydantic model.
        ranks: whether clients may have unequal ranks (``lora.ranks``).
        spare: whether the adapter has ranks that no client trains (``lora.spare``).
        pools: whether all training rows are in one place, without federation.
        names: whether each question begins with the name of its client.
        partial: the reason why the rest of an upload may not be sent in later rounds
            (``wire.compress=topk``); empty if it may.
        check: ``(config) -> text``: the problem with a run's settings; empty if there is none.
        fits: ``(settings, modules) -> problems`` of the settings with the adapted modules.
    """

    sends: str
    keeps: str
    source: str
    build: Callable[[Any, LoraConfig], Algorithm]
    settings: type[AlgorithmConfig] = AlgorithmConfig
    ranks: bool = False
    spare: bool = False
    pools: bool = False
    names: bool = False
    partial: str = ""
    check: Callable[[Config], str] = lambda config: ""
    fits: Callable[[Any, Iterable[str]], list[str]] = lambda settings, modules: []

"""A row of the table of algorithms; an outside package brings rows of its own."""

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
        sends: what leaves a client.
        keeps: what is personal and stays.
        source: the paper.
        build: ``(settings, lora) -> algorithm``; the settings are an instance of ``settings``.
        settings: the section ``algorithm`` of a run's configuration, a frozen pydantic model.
        ranks: whether clients may have unequal ranks (``lora.ranks``).
        spare: whether the adapter has ranks that no client trains (``lora.spare``).
        pools: whether all training rows are in one place; no federation.
        names: whether a question begins with its client's name.
        partial: why the rest of an upload may not be sent later (``wire.compress=topk``), if so.
        check: ``(config) -> text``: what is wrong with a run's settings; empty if nothing is.
        fits: ``(settings, modules) -> problems``: what does not fit the adapted modules.
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

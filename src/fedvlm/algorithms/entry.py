"""A row of the table of algorithms; other packages can add rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

from fedvlm.algorithms.base import Algorithm
from fedvlm.errors import FedVLMError
from fedvlm.settings.method import AlgorithmConfig, LoraConfig
from fedvlm.settings.sections import Config

GROUP = "fedvlm.algorithms"
"""The group of the entry points by which other packages add rows."""


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
        unprotected: the reason why clients may not run it with differential privacy of their rows
            (``privacy.unit``); empty if they may.
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
    unprotected: str = ""
    check: Callable[[Config], str] = lambda config: ""
    fits: Callable[[Any, Iterable[str]], list[str]] = lambda settings, modules: []


def loaded(point: EntryPoint) -> Entry:
    """The row that an installed package adds.

    Raises:
        FedVLMError: it cannot be loaded, or it is no row.
    """
    name = point.name
    try:
        found = point.load()
    except Exception as error:
        raise FedVLMError(
            f"algorithm '{name}' of the installed package cannot be loaded from '{point.value}': "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, Entry):
        raise FedVLMError(
            f"algorithm '{name}': '{point.value}' must be a fedvlm.Entry, got "
            f"{type(found).__name__}"
        )
    if not (isinstance(found.settings, type) and issubclass(found.settings, AlgorithmConfig)):
        raise FedVLMError(
            f"algorithm '{name}': the settings of '{point.value}' must be a subclass of "
            f"fedvlm.AlgorithmConfig, got {found.settings!r:.80}"
        )
    return found


def _missing(config: AlgorithmConfig, lora: LoraConfig) -> Algorithm:
    raise FedVLMError(
        f"algorithm.name={config.name}: the algorithm of this run was given as an object; give it "
        "again in Python (algorithm=... of fedvlm.resume, open_run and onboard), or install it as "
        f"an entry point of the group '{GROUP}'"
    )


HANDED_OVER = Entry(
    "what the object's work returns", "what the object keeps", "given as an object", _missing
)

"""Engines: how the clients of a round are trained and scored."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedvlm.engines.reference import ReferenceEngine
    from fedvlm.sections import EngineConfig


def engine_class(config: EngineConfig) -> type[ReferenceEngine]:
    """The engine that a config names."""
    from fedvlm.engines.cohort import CohortEngine
    from fedvlm.engines.reference import ReferenceEngine

    return {"cohort": CohortEngine, "reference": ReferenceEngine}[config.name]

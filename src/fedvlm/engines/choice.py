"""The choice of the engine that trains and scores a run's clients."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from fedvlm.tree import module

if TYPE_CHECKING:
    from fedvlm.engines.shell import Shell
    from fedvlm.settings.sections import EngineConfig

logger = logging.getLogger("fedvlm")

ROUTED = re.compile(r"(^|\.)experts?\.")
"""Layers of a mixture of experts: a token's place does not show whose row it belongs to."""


def engine_class(config: EngineConfig, model: Any) -> type[Shell]:
    """The engine that a config names, where it can train the model's adapted layers.

    Args:
        config: of the engine.
        model: with LoRA attached.
    """
    from fedvlm.engines.cohort import CohortEngine
    from fedvlm.engines.reference import ReferenceEngine
    from fedvlm.models.lora import handles

    routed = sorted({module(name) for name in handles(model) if ROUTED.search(name)})
    if config.name == "cohort" and routed:
        logger.warning(
            "LoRA is on %d layers of a mixture of experts, such as %s: clients are trained one "
            "after another (engine.name=reference); a lora.target without them trains many at once",
            len(routed),
            routed[0],
        )
        return ReferenceEngine
    return {"cohort": CohortEngine, "reference": ReferenceEngine}[config.name]

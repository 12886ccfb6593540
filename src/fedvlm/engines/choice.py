"""Engines: how the clients of a round are trained and scored."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from fedvlm.tree import module

if TYPE_CHECKING:
    from fedvlm.engines.reference import ReferenceEngine
    from fedvlm.settings.sections import EngineConfig

logger = logging.getLogger("fedvlm")

ROUTED = re.compile(r"(^|\.)experts?\.")
"""Layers that get the tokens a router chose: whose they are cannot be told from their place."""


def engine_class(config: EngineConfig, model: Any) -> type[ReferenceEngine]:
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

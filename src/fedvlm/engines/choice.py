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
"""Layers of a mixture of experts: the position of a token does not show the row of the token."""


def engine_class(config: EngineConfig, model: Any) -> type[Shell]:
    """The configured engine; the reference engine where LoRA is on a mixture of experts.

    Args:
        config: settings of the engine.
        model: the model with LoRA attached.
    """
    from fedvlm.engines.cohort import CohortEngine
    from fedvlm.engines.reference import ReferenceEngine

    experts = routed(model)
    if config.name == "cohort" and experts:
        logger.warning(
            "LoRA is on %d layers of a mixture of experts, such as %s: clients train one after "
            "another (engine.name=reference); to train many at once, leave them out of lora.target",
            len(experts),
            experts[0],
        )
        return ReferenceEngine
    return {"cohort": CohortEngine, "reference": ReferenceEngine}[config.name]


def routed(model: Any) -> list[str]:
    """The layers with LoRA that belong to a mixture of experts; no stack can serve them."""
    from fedvlm.models.lora import handles

    return sorted({module(name) for name in handles(model) if ROUTED.search(name)})

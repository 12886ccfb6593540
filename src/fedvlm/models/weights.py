"""Whether a checkpoint had all weights of its model."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from fedvlm.errors import FedVLMError, brief


def check_weights(name: str, model: Any, report: dict[str, Any]) -> None:
    """Refuses a checkpoint that lacks weights of the model: such weights would be random."""
    lacking = set(report["missing_keys"])
    weights = dict(model.named_parameters(remove_duplicate=False))
    loaded = {_place(w) for n, w in weights.items() if n not in lacking}
    missing = sorted(n for n in lacking & set(weights) if _place(weights[n]) not in loaded)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FedVLMError(
            f"model.name: '{brief(name)}' lacks {len(missing)} weights of {type(model).__name__} "
            f"({', '.join(missing[:3])}{more}), which would be random; use a checkpoint with all "
            "weights in transformers' own format"
        )
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        logging.getLogger("fedvlm").warning(
            "%s: %d weights are not used by %s (%s, ...)",
            brief(name), len(unexpected), type(model).__name__, brief(", ".join(unexpected[:3])),
        )  # fmt: skip


def _place(weight: Tensor) -> int:
    """The same for tied weights only; a weight in a store of accelerate has no memory here."""
    return id(weight) if weight.is_meta else weight.data_ptr()

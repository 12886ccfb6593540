"""The untuned model's answers, remembered from round to round and from run to run.

They depend on the frozen model, the rows and a few settings. An adapter whose B is zero gives them
too, whatever its A: the untuned model of every run, and the global model of algorithms that share
no B. Compared runs hand them on (:func:`fedvlm.models.frozen.handed_on`).
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fedvlm.batches.collate import Collator
from fedvlm.engines.base import Answer
from fedvlm.models import frozen
from fedvlm.models.load import identity
from fedvlm.settings.sections import Config

MOST = 20_000  # answers that are kept


class Untuned:
    """Answers to held-out rows by everything that they depend on.

    Args:
        engine: the name of the engine, because engines round differently.
        model: the model with its adapter.
        collator: makes batches of the rows.
        config: the settings of the run.
    """

    def __init__(self, engine: str, model: Any, collator: Collator, config: Config):
        self._engine, self._model = engine, model
        self._collator, self._config = collator, config
        self._kept = frozen.answers()

    @cached_property
    def _source(self) -> str:
        """The identity of the frozen model, whose files may be gone later."""
        return identity(self._config.model)

    def get(self, rows: np.ndarray) -> list[list[Answer]] | None:
        """One list: the answers to these rows in this order; None where they are not known."""
        return self._kept.get(self._key(rows))

    def keep(self, rows: np.ndarray, answers: list[list[Answer]]) -> None:
        """Remembers the answers, and forgets the oldest beyond :data:`MOST`."""
        self._kept[self._key(rows)] = answers
        while sum(len(own) for (own,) in self._kept.values()) > MOST:
            del self._kept[next(iter(self._kept))]

    def _key(self, rows: np.ndarray) -> str:
        config = self._config
        parts = [
            self._engine,
            self._source,
            self._model.generation_config.to_dict(),
            [str(self._collator.device), torch.get_num_threads()],
            [getattr(config, part).model_dump() for part in ("eval", "objective", "engine")],
            config.lora.target,  # it decides whether pictures are encoded one by one
            self._collator.key,
            rows.tolist(),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

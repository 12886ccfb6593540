"""A step of the cohort engine, in a process of its own; `launches.py` starts it.

    python -m _steps WIDTH DTYPE

Reads one word a line and answers with a line of JSON: `step` and `frozen` ask for the operations
of a step, and of the frozen model alone, by name; `seconds` for the CPU seconds of a step.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from typing import Any

import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode

import _shapes
import _sides
from _common import Work

CLIENTS, BATCH, STEPS = 16, 2, 20
NOT_LAUNCHED = {
    *("_unsafe_view", "detach"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("profiler::_record_function_enter_new", "profiler::_record_function_exit"),
}
"""Views, allocations and marks of the profiler."""


class Counted(TorchDispatchMode):
    """Counts the operations that start a kernel on a GPU, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in NOT_LAUNCHED:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def smol(width: int) -> _shapes.Shape:
    """SmolVLM's classes with the 30 layers of SmolLM2-135M, and short rows; one image token."""
    config = hf.AutoConfig.for_model(
        "smolvlm",
        image_token_id=5,
        scale_factor=3,
        tie_word_embeddings=False,
        pad_token_id=2,
        vision_config={
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": 24,
            "patch_size": 8,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 1000,
            "hidden_size": width,
            "intermediate_size": 8 * width // 3,
            "num_hidden_layers": 30,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
        },
    )
    return _shapes.Shape(config, side=24, image_tokens=1, question=4, answer=4)


class Cohort:
    """The cohort engine on a model of that shape, on one thread of the CPU."""

    def __init__(self, width: int, dtype: torch.dtype):
        self._shape, self._dtype = smol(width), dtype
        settings = CLIENTS, CLIENTS, BATCH, STEPS, "language"
        self._engine, self._partition = _shapes.engine(
            "cohort", self._model(), self._shape, *settings
        )
        collator: Any = self._engine.collator
        collator.features = functools.cache(collator.features)  # rows are made once

    def _model(self) -> Any:
        return _shapes.build(self._shape, torch.device("cpu"), self._dtype)

    def training(self, steps: int) -> Work:
        """A round of some steps of all clients."""
        config = self._engine.config
        train = config.train.model_copy(update={"local_steps": steps})
        self._engine.config = config.model_copy(update={"train": train})
        return _sides.training(self._engine, self._partition.clients)

    def step(self) -> Counter[str]:
        """The operations of a step: a round of three less a round of two."""
        return count(self.training(3)) - count(self.training(2))

    def frozen(self) -> Counter[str]:
        """The operations of the same rows through the frozen model alone, forward and back."""
        bare, found = self._model(), []
        for steps in (3, 2):
            self.training(steps)
            found.append(count(_sides.floor(bare, self._engine, self._partition)))
        return found[0] - found[1]

    def seconds(self) -> float:
        """CPU seconds of a step."""
        work = self.training(STEPS)
        began = time.process_time()
        work()
        return (time.process_time() - began) / STEPS


def count(work: Work) -> Counter[str]:
    work()
    with Counted() as counted:
        work()
    return counted.found


def main() -> None:
    torch.set_num_threads(1)
    cohort = Cohort(int(sys.argv[1]), getattr(torch, sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(getattr(cohort, line.strip())()), flush=True)


if __name__ == "__main__":
    main()

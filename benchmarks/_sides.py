"""The sides that `engine.py` and `gpu.py` compare: a round of an engine, and its lower bound."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from _common import Work
from fedvlm.algorithms.base import Visit
from fedvlm.batches.draw import batches
from fedvlm.batches.objectives import answer_nll
from fedvlm.engines.shell import Shell
from fedvlm.engines.wire import Task
from fedvlm.models.frozen import ImageFeatures
from fedvlm.seeds import derive
from fedvlm.settings.sections import Config


def training(engine: Shell, clients: Sequence[str]) -> Work:
    """The training of all clients in one round."""
    state = engine.algorithm.init(engine.adapter)
    visits = [Visit(client, 1.0, round=1) for client in clients]
    tasks = [Task(visit, engine.algorithm.send(state, visit)) for visit in visits]
    return lambda: list(engine.train(tasks))


def drawn(config: Config, rows: np.ndarray, client: str, round_: int) -> list[np.ndarray]:
    """The rows of each batch of a client in a round, as the engines draw them."""
    train = config.train
    seed = derive(config.seed, round_, client, 0, "batches")
    return list(batches(rows, train.batch_size, train.steps(len(rows)), seed))


def floor(bare: Any, engine: Shell, partition: Any) -> Work:
    """The same rows through the frozen model without adapters: forward, and back to the inputs.

    This is the cost of the base layers, a lower bound for the training of adapters. It includes no
    optimizer, no rank products and no round loop. Where LoRA is in the language model only, image
    features are cached here as well, and gradients stop at them.
    """
    splits = partition.splits
    own = [drawn(engine.config, splits[c].train, c, 1) for c in partition.clients]
    kept = engine.config.lora.target == "language"
    images = ImageFeatures(bare, engine.collator.picture, 1 << 34) if kept else None
    bare.train()
    tokens = bare.get_input_embeddings().num_embeddings
    for module in bare.modules():  # the token embeddings of an encoder and of a decoder
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == tokens:
            module.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))

    def work() -> None:
        for step in zip(*own, strict=True):
            rows = np.concatenate(step)
            batch = engine.collator.training(rows)
            if not kept:
                batch["pixel_values"].requires_grad_(True)
            with images.given(list(rows)) if images else contextlib.nullcontext():
                loss, weight, _ = answer_nll(bare, batch)
            shape = (len(step), -1)
            (loss.view(shape).sum(1) / weight.view(shape).sum(1)).sum().backward()

    return work

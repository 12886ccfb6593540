"""Models of released shapes with random weights, and synthetic rows. Nothing is downloaded.

Speed does not depend on the values of weights, so the configuration of a model is enough. The rows
hold random tokens and pixels. All rows have one size.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers as hf

import fedvlm
from fedvlm.algorithms.table import of_run
from fedvlm.batches.collate import Collator
from fedvlm.batches.prompts import Features
from fedvlm.data.partition import Split
from fedvlm.engines.choice import engine_class
from fedvlm.engines.shell import Shell
from fedvlm.models.load import quiet_transformers, without_dropout
from fedvlm.models.lora import attach, drop_dead
from fedvlm.store.run import Store

ROWS, PICTURES = 64, 8  # rows of a client, and distinct pictures among them


@dataclass(frozen=True)
class Shape:
    """A model and the size of its rows.

    Attributes:
        config: configuration of transformers.
        side: width and height of a picture, in pixels.
        image_tokens: number of tokens of a picture of this size.
        question: number of text tokens before the answer.
        answer: number of tokens in the loss.
    """

    config: Any
    side: int
    image_tokens: int
    question: int = 32
    answer: int = 32


def florence(size: str, side: int = 768) -> Shape:
    """Florence-2 (arXiv 2311.06242), `base` or `large`: DaViT and BART.

    A picture becomes one token for each 32 x 32 pixels and one token for their mean. The windows
    of DaViT are 12 tokens wide at each of four scales. Sides of 384 and 768 pixels fill them.
    """
    wide = size == "large"
    heads = (8, 16, 32, 64) if wide else (4, 8, 16, 32)
    layers = {"layers": 12, "attention_heads": 16, "ffn_dim": 4096}
    if not wide:
        layers = {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}
    config = hf.Florence2Config(
        vision_config={
            "depths": (1, 1, 9, 1),
            "embed_dim": (256, 512, 1024, 2048) if wide else (128, 256, 512, 1024),
            "num_heads": heads,
            "num_groups": heads,
            "window_size": 12,
            "projection_dim": 1024 if wide else 768,
        },
        text_config={
            "model_type": "bart",
            "vocab_size": 51290,
            "d_model": 1024 if wide else 768,
            "max_position_embeddings": 4096 if wide else 1024,
            **{f"{part}_{k}": n for part in ("encoder", "decoder") for k, n in layers.items()},
        },
    )
    return Shape(config, side, (side // 32) ** 2 + 1)


def smolvlm(side: int = 512) -> Shape:
    """SmolVLM-500M: SigLIP-B/16 at 512 pixels and SmolLM2-360M. A tile has 64 image tokens."""
    config = hf.AutoConfig.for_model(
        "smolvlm",
        image_token_id=49190,
        scale_factor=4,
        tie_word_embeddings=False,
        pad_token_id=2,
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 49280,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
    )
    return Shape(config, side, (side // 64) ** 2)


SHAPES = {
    "florence-2-base": lambda side=768: florence("base", side),
    "florence-2-large": lambda side=768: florence("large", side),
    "smolvlm-500m": smolvlm,
}


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """The frozen model, with random weights."""
    quiet_transformers()
    without_dropout(shape.config)
    torch.manual_seed(0)
    with device:
        model = hf.AutoModelForImageTextToText.from_config(shape.config, dtype=dtype)
    return model.requires_grad_(False).to(device)


def engine(
    name: str,
    model: Any,
    shape: Shape,
    clients: int,
    width: int,
    batch: int,
    steps: int,
    target: str,
) -> tuple[Shell, Any]:
    """An engine with synthetic rows and `width` clients in a pass, and their partition."""
    config = fedvlm.load_config(
        {
            "output": tempfile.mkdtemp() + "/run",
            "lora": {"target": target},
            "algorithm": {"name": "lora"},  # clients keep nothing, so the clock includes no disk
            "train": {"batch_size": batch, "local_steps": steps},
            "engine": {"name": name, "clients": width if name == "cohort" else None},
        }
    )
    rows = np.arange(clients * max(ROWS, batch)).reshape(clients, -1)
    splits = {f"client{k}": Split(own, own[:0], own[:0]) for k, own in enumerate(rows)}
    partition: Any = SimpleNamespace(clients=tuple(splits), splits=splits)
    collator = MadeUp(shape, model)
    probe = collator.training(rows[0, :1])

    def loss(adapted: Any) -> torch.Tensor:
        from fedvlm.batches.objectives import sft_terms

        return sft_terms(adapted, probe).mean()

    adapted = attach(model, config.lora, config.seed)
    adapted = drop_dead(adapted, config.lora, config.seed, loss)
    store = Store(config.output)
    return engine_class(config.engine, adapted)(
        adapted, collator, partition, config, store, of_run(config)
    ), partition


class MadeUp(Collator):
    """Rows of random tokens and pixels. The pixels are on the device from the start."""

    def __init__(self, shape: Shape, model: Any):
        self.shape = shape
        self.device = next(model.parameters()).device
        self.dtype = model.dtype
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self.roles = ("answer",)
        self.vocabulary = min(40_000, shape.config.text_config.vocab_size)
        self._pad_id = 1
        self._thread, self._next = ThreadPoolExecutor(1), None
        random = torch.Generator().manual_seed(0)
        square = (1, 3, shape.side, shape.side)
        if model.config.model_type == "smolvlm":
            square = (1, *square)  # tiles of one picture
        pixels = [torch.randn(square, generator=random) for _ in range(PICTURES)]
        self._pixels = [p.to(self.device, self.dtype) for p in pixels]

    def features(self, index: int) -> Features:
        random = torch.Generator().manual_seed(int(index))
        question, answer = (
            torch.randint(10, self.vocabulary, (n,), generator=random)
            for n in (self.shape.question, self.shape.answer)
        )
        image = torch.full((self.shape.image_tokens,), self.shape.config.image_token_id)
        pixels = {"pixel_values": self._pixels[int(index) % PICTURES]}
        return Features(torch.cat([image, question]), (answer,), {}, pixels)

"""Parts of the models in :mod:`families`: tokenizers, towers, weights, folders."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import nn

from fedvlm.models.load import ASSETS
from fedvlm.models.processors import image_only, num2words_or_none

WIDTH, SIDE, PATCH = 32, 32, 8
CENTRE = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"height": SIDE, "width": SIDE}
LENGTH = 512
FOLDERS: set[str] = set()
"""The folders of all models that this process has saved."""
SHARP = re.compile(r"\b(q|k|q_proj|k_proj|query|key)\.weight$")  # attention that picks and chooses


def make_tokenizer(
    *, pad: str, eos: str, bos: str | None = None, more: tuple[str, ...] = (),
    named: dict[str, str] | None = None, begin: str | None = None, end: str | None = None,
    side: str = "left",
) -> Any:  # fmt: skip
    """A tokenizer with the bundled merges and a family's special tokens.

    Args:
        more: further special tokens.
        named: special tokens that become attributes of the tokenizer.
        begin: token that every text begins with, as the family's tokenizer does by itself.
        end: token that every text ends with.
    """
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(ASSETS / "tiny" / "tokenizer.json"),
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        padding_side=side,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=named or {},
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in more], True)
    if begin or end:
        marks = [t for t in (begin, end) if t]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=" ".join(t for t in (begin, "$A", end) if t),
            special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in marks],
        )
    return tokenizer


def llama_tokenizer() -> Any:
    return make_tokenizer(
        pad="<pad>", eos="</s>", bos="<s>", begin="<s>", named={"image_token": "<image>"}
    )


def qwen_tokenizer(*more: str, **named: str) -> Any:
    return make_tokenizer(
        pad="<|endoftext|>", eos="<|im_end|>", more=("<|im_start|>", *more), named=named
    )


def scale(model: nn.Module) -> None:
    """Draws all weights with deviation 1 / sqrt(inputs); attention's queries and keys get more."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            kernel = parameter.dim() > 3  # of a convolution
            fan_in = parameter[0].numel() if kernel else parameter.shape[-1]
            gain = 1.7 if SHARP.search(name) else 1.0
            nn.init.normal_(parameter, std=gain / math.sqrt(fan_in))
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    model.tie_weights()  # type: ignore[operator]


def save(config: Any, processor: Any, folder: Path, *, eos: list[str], **generation: Any) -> None:
    """Saves a seeded model of the configuration, its processor, and its generation settings."""
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config)
    scale(model)
    tokenizer = processor.tokenizer
    ends = [tokenizer.convert_tokens_to_ids(t) for t in eos]
    model.generation_config = hf.GenerationConfig(
        eos_token_id=ends if len(ends) > 1 else ends[0],
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        **generation,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    FOLDERS.add(str(folder))


def special(tokenizer: Any) -> dict[str, Any]:
    return {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("pad", "bos", "eos")}


def text(tokenizer: Any, kind: str, **more: Any) -> dict[str, Any]:
    """Settings of a small decoder of the Llama kind."""
    return {
        "model_type": kind,
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        **special(tokenizer),
        **more,
    }


def vision(kind: str, **more: Any) -> dict[str, Any]:
    """Settings of a small vision tower: 32 x 32 pixels in 16 patches."""
    return {
        "model_type": kind,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        **more,
    }


def pictures_only(processor_class: Any, video: str) -> Any:
    """Builds a processor without its video part. Only the saved settings name that part."""

    def make(*parts: Any, **settings: Any) -> Any:
        with num2words_or_none(processor_class):
            processor = image_only(processor_class)(*parts, video_processor=None, **settings)
        processor._video_config = {"video_processor_type": video}
        return processor

    return make


def ids(tokenizer: Any, **tokens: str) -> dict[str, int]:
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in tokens.items()}

"""Builds the bundled tiny vision-language model from classes of transformers.

The shipped folder (`fedvlm/assets/tiny`) loads with `AutoModelForImageTextToText` and
`AutoProcessor`, without this module. This module builds the parts of the folder: a byte-level
tokenizer, an Idefics3 processor that resizes any picture to 64 x 64 pixels (16 image tokens), and a
randomly initialised Idefics3 model. `scripts/train_tiny.py` trains the model.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
)
from transformers import PreTrainedTokenizerFast as FastTokenizer

TINY = Path(__file__).resolve().parents[1] / "src" / "fedvlm" / "assets" / "tiny"
SIDE, PATCH, SCALE = 64, 8, 2
IMAGE_TOKENS = (SIDE // PATCH // SCALE) ** 2
MAX_LENGTH = 1024  # tokens of text and picture together

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
SPECIAL = (PAD, END, USER, ASSISTANT, IMAGE, FAKE, GLOBAL, "<end_of_utterance>")

# A user turn is the picture and the question. An answer ends with the end token. There is no text
# between a marker and its content, so `prompt + answer + end` gives the same string and the same
# tokens as the template of the whole dialogue.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_PIECES = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def corpus(seed: int = 0, scenes: int = 20_000) -> Iterator[str]:
    """The training text of the tokenizer: questions, answers, lexicons and general words.

    The novel kinds are left out. Their names consist of pieces that the model has been trained on.
    """
    from fedvlm.data import compose, questions, words

    rng = random.Random(f"corpus/{seed}")
    kinds = [kind for kind in questions.GENERIC if kind != "say"]
    for _ in range(scenes):
        kind = rng.choice(kinds)
        item = questions.ask(rng, kind, compose.make_scene(rng, kind))
        if item is not None:
            yield item.question
            yield item.chosen
    for word in words.GENERAL * 30:
        yield f"{word} {word}"
    for table in words.LANGUAGES.values():
        for word in list(table.values()) * 4:
            yield f"{word} {word}"


def build_tokenizer(texts: Iterable[str], vocabulary: int = 1152) -> FastTokenizer:
    """A byte-level BPE tokenizer. Any text encodes, and decodes to itself.

    Args:
        texts: training text of the merges.
        vocabulary: number of tokens, with the 256 bytes and the special tokens.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return FastTokenizer(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "image_token": IMAGE,
            "fake_image_token": FAKE,
            "global_image_token": GLOBAL,
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )


def build_processor(tokenizer: FastTokenizer) -> Idefics3Processor:
    """The processor: pictures of any size become 64 x 64 pixels, `<image>` becomes 16 tokens."""
    pictures = Idefics3ImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return Idefics3Processor(
        pictures, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE
    )


def build_model(
    tokenizer: FastTokenizer,
    *,
    width: int = 128,
    vision_layers: int = 3,
    text_layers: int = 4,
    seed: int = 0,
) -> Idefics3ForConditionalGeneration:
    """A fresh tiny model. Weights of linear layers start with a deviation of 1 / sqrt(inputs).

    The default of transformers, 0.02, suits wide models. At this width training gets stuck with it.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Idefics3Config(
        image_token_id=ids[IMAGE],  # type: ignore[arg-type]
        scale_factor=SCALE,
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],  # type: ignore[call-arg]
        vision_config={
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": text_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": MAX_LENGTH,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "pad_token_id": ids[PAD],
            "bos_token_id": None,
            "eos_token_id": ids[END],
        },
    )
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=width**-0.5)
    model.tie_weights()
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.bos_token_id = ids[END], ids[PAD], None
    settings.do_sample, settings.max_new_tokens = False, 32
    return model


def save(
    model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, folder: str | Path
) -> None:
    """Writes a folder for the Auto classes. The weights are stored in fp16."""
    half = copy.deepcopy(model).half()
    half.save_pretrained(folder)
    half.config.dtype = "float32"  # the dtype after loading, and of the computation
    half.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    (Path(folder) / "model.safetensors").chmod(0o644)

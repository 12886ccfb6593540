"""A zoo of tiny vision-language models: one of every family, from its real classes, offline.

``build(family, folder)`` writes the files that ``save_pretrained`` of a model and its processor
write. The weights are random, but large enough that image and text change the logits. Tokenizers,
templates and ends of answers have the structure of the families' checkpoints on the hub.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf

import zoo_templates as templates
from zoo import (
    CENTRE,
    PATCH,
    SIDE,
    SQUARE,
    WIDTH,
    ids,
    llama_tokenizer,
    make_tokenizer,
    pictures_only,
    qwen_tokenizer,
    save,
    special,
    text,
    vision,
)

FAMILIES: dict[str, Callable[[Path], None]] = {}


@functools.cache
def folder(family: str) -> str:
    """A family's folder. It is built once in a session of tests."""
    path = tempfile.mkdtemp(prefix=f"{family}-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    build(family, Path(path))
    return path


def build(family: str, folder: Path) -> None:
    """Writes a family's tiny model and its processor to a folder."""
    FAMILIES[family](Path(folder))


def family(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(make: Callable[[Path], None]) -> Callable[[Path], None]:
        FAMILIES[name] = make
        return make

    return register


@family("florence2")
def _florence2(folder: Path) -> None:
    tokenizer = make_tokenizer(
        pad="<pad>", eos="</s>", bos="<s>", begin="<s>", end="</s>", side="right",
        named={"image_token": "<image>"},
    )  # fmt: skip
    pictures = hf.CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, **CENTRE)
    pictures.image_seq_length = 2  # one feature and the mean
    layers = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
    bart = {f"{part}_{k}": n for part in ("encoder", "decoder") for k, n in layers.items()}
    marks = special(tokenizer) | {
        "decoder_start_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": tokenizer.eos_token_id,
    }
    config = hf.Florence2Config(
        vision_config={
            "depths": (1,) * 4, "embed_dim": (16, 16, 32, 32), "num_heads": (2,) * 4,
            "num_groups": (2,) * 4, "window_size": 4, "projection_dim": WIDTH,
        },
        text_config={
            "model_type": "bart", "vocab_size": len(tokenizer), "d_model": WIDTH,
            "max_position_embeddings": 512, **bart, **marks,
        },
        **ids(tokenizer, image_token_id="<image>"), **marks,
    )  # fmt: skip
    processor = hf.Florence2Processor(pictures, tokenizer)
    start = tokenizer.eos_token_id
    save(config, processor, folder, eos=["</s>"], decoder_start_token_id=start, num_beams=3)


@family("idefics3")
def _idefics3(folder: Path) -> None:
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"  # an answer ends with <end_of_utterance>
    tokenizer = make_tokenizer(
        pad="<|pad|>", eos=eos, bos=bos, begin=bos,
        more=("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
    )  # fmt: skip
    classes = hf.Idefics3Processor, hf.Idefics3ImageProcessorPil
    _idefics(folder, "idefics3", tokenizer, *classes, eos=[eos, "<end_of_utterance>"])


@family("smolvlm")
def _smolvlm(folder: Path) -> None:
    image = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
    }  # fmt: skip
    tokenizer = make_tokenizer(
        pad="<|im_end|>", eos="<end_of_utterance>", bos="<|im_start|>", named=image
    )
    classes = (
        pictures_only(hf.SmolVLMProcessor, "SmolVLMVideoProcessor"),
        hf.SmolVLMImageProcessorPil,
    )
    _idefics(folder, "smolvlm", tokenizer, *classes, eos=["<end_of_utterance>"])


def _idefics(
    folder: Path, kind: str, tokenizer: Any, processor_class: Any, pictures: Any, eos: list[str]
) -> None:
    edge = {"longest_edge": SIDE}
    processor = processor_class(
        pictures(size=edge, max_image_size=edge, do_image_splitting=False, **CENTRE),
        tokenizer,
        image_seq_len=4,
        chat_template=templates.IDEFICS.replace("BOS", tokenizer.bos_token),
    )
    config = hf.AutoConfig.for_model(
        kind,
        scale_factor=2,
        vision_config=vision(f"{kind}_vision"),
        text_config=text(tokenizer, "llama"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        **ids(tokenizer, image_token_id="<image>"),
    )
    save(config, processor, folder, eos=eos)


@family("llava")
def _llava(folder: Path) -> None:
    tokenizer = llama_tokenizer()
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE, **CENTRE),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA,
    )
    config = hf.LlavaConfig(
        vision_config=vision("clip_vision_model"),
        text_config=text(tokenizer, "llama"),
        image_seq_length=16,
        **ids(tokenizer, image_token_index="<image>"),
    )
    save(config, processor, folder, eos=["</s>"])


PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]


@family("llava_next")
def _llava_next(folder: Path) -> None:
    tokenizer = llama_tokenizer()
    pictures = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **CENTRE
    )
    processor = hf.LlavaNextProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA_MISTRAL,
    )
    config = hf.LlavaNextConfig(
        vision_config=vision("clip_vision_model"),
        text_config=text(tokenizer, "mistral"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        **ids(tokenizer, image_token_index="<image>"),
    )
    save(config, processor, folder, eos=["</s>"])


@family("llava_onevision")
def _llava_onevision(folder: Path) -> None:
    tokenizer = qwen_tokenizer(image_token="<image>", video_token="<video>")
    pictures = hf.LlavaOnevisionImageProcessorPil(
        size=SQUARE, image_grid_pinpoints=PINPOINTS, **CENTRE
    )
    video = "LlavaOnevisionVideoProcessor"
    processor = pictures_only(hf.LlavaOnevisionProcessor, video)(
        pictures,
        tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=templates.LLAVA_ONEVISION,
    )
    config = hf.LlavaOnevisionConfig(
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        text_config=text(tokenizer, "qwen2"),
        image_grid_pinpoints=PINPOINTS,
        **ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    save(config, processor, folder, eos=["<|im_end|>", "<|endoftext|>"])


@family("paligemma")
def _paligemma(folder: Path) -> None:
    tokenizer = make_tokenizer(
        pad="<pad>", eos="<eos>", bos="<bos>", begin="<bos>", named={"image_token": "<image>"}
    )
    pictures = hf.SiglipImageProcessorPil(size=SQUARE, **CENTRE)
    pictures.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(pictures, tokenizer)
    config = hf.PaliGemmaConfig(
        vision_config=vision(
            "siglip_vision_model", projection_dim=WIDTH, vision_use_head=False, num_image_tokens=16
        ),
        text_config=text(tokenizer, "gemma", head_dim=8, num_key_value_heads=1),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        vocab_size=len(tokenizer),
        **special(tokenizer),
        **ids(tokenizer, image_token_index="<image>"),
    )
    save(config, processor, folder, eos=["<eos>"])


@family("gemma3")
def _gemma3(folder: Path) -> None:
    image = {
        "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }  # fmt: skip
    tokenizer = make_tokenizer(
        pad="<pad>", eos="<eos>", bos="<bos>", begin="<bos>", named=image,
        more=("<start_of_turn>", "<end_of_turn>"),
    )  # fmt: skip
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessorPil(size=SQUARE, **CENTRE),
        tokenizer,
        image_seq_length=4,
        chat_template=templates.GEMMA,
    )
    config = hf.Gemma3Config(
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        text_config=text(
            tokenizer, "gemma3_text", head_dim=8, sliding_window=32, query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=4,
        **special(tokenizer),
        **ids(
            tokenizer, boi_token_index="<start_of_image>", eoi_token_index="<end_of_image>",
            image_token_index="<image_soft_token>",
        ),
    )  # fmt: skip
    save(config, processor, folder, eos=["<eos>", "<end_of_turn>"])


def _qwen(folder: Path, kind: str, processor_class: Any, video: str, template: str,
          vision_config: dict[str, Any], rope: dict[str, Any], **more: Any) -> None:  # fmt: skip
    marks = {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    }  # fmt: skip
    tokenizer = qwen_tokenizer(*marks.values())
    pictures = hf.Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2,
        size={"shortest_edge": SIDE**2, "longest_edge": 2 * SIDE**2}, **CENTRE,
    )  # fmt: skip
    processor = pictures_only(processor_class, video)(pictures, tokenizer, chat_template=template)
    config = hf.AutoConfig.for_model(
        kind,
        vision_config={
            "depth": 3, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2,
            **vision_config,
        },
        text_config=text(
            tokenizer, f"{kind}_text", rope_parameters={"rope_theta": 1e4, **rope}, **more
        ),
        **ids(tokenizer, **marks),
    )  # fmt: skip
    save(config, processor, folder, eos=["<|im_end|>", "<|endoftext|>"])


MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1]}


@family("qwen2_vl")
def _qwen2_vl(folder: Path) -> None:
    sizes = {"embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}
    names = hf.Qwen2VLProcessor, "Qwen2VLVideoProcessor"
    _qwen(folder, "qwen2_vl", *names, templates.QWEN2, sizes, MROPE)


@family("qwen2_5_vl")
def _qwen2_5_vl(folder: Path) -> None:
    sizes = {
        "hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 64,
        "window_size": 2 * PATCH, "fullatt_block_indexes": [2],
    }  # fmt: skip
    names = hf.Qwen2_5_VLProcessor, "Qwen2VLVideoProcessor"
    _qwen(folder, "qwen2_5_vl", *names, templates.QWEN2, sizes, MROPE)


@family("qwen3_vl")
def _qwen3_vl(folder: Path) -> None:
    sizes = {
        "hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 64,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    names = hf.Qwen3VLProcessor, "Qwen3VLVideoProcessor"
    rope = MROPE | {"mrope_interleaved": True}
    _qwen(folder, "qwen3_vl", *names, templates.QWEN3, sizes, rope, head_dim=8, num_hidden_layers=3)


@family("internvl")
def _internvl(folder: Path) -> None:
    tokenizer = qwen_tokenizer(
        start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    processor = pictures_only(hf.InternVLProcessor, "InternVLVideoProcessor")(
        hf.GotOcr2ImageProcessorPil(size=SQUARE, min_patches=1, max_patches=2, **CENTRE),
        tokenizer,
        image_seq_length=4,
        chat_template=templates.INTERNVL,
    )
    config = hf.InternVLConfig(
        vision_config=vision(
            "internvl_vision", image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH],
            use_mean_pooling=True, attention_bias=True,
        ),
        text_config=text(tokenizer, "qwen2"),
        image_seq_length=4,
        tie_word_embeddings=False,
        **ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )  # fmt: skip
    save(config, processor, folder, eos=["<|im_end|>", "<|endoftext|>"])


def _blip2(
    folder: Path, tokenizer: Any, text_config: dict[str, Any], eos: str, **more: Any
) -> None:
    processor = hf.Blip2Processor(
        hf.BlipImageProcessorPil(size=SQUARE, **CENTRE), tokenizer, num_query_tokens=4
    )
    small = {"num_attention_heads": 4, "intermediate_size": 2 * WIDTH}
    config = hf.Blip2Config(
        vision_config=vision("blip_2_vision_model"),
        qformer_config={
            "vocab_size": 8, "hidden_size": WIDTH, "encoder_hidden_size": WIDTH,
            "num_hidden_layers": 2, **small,
        },
        text_config=text_config | {"vocab_size": len(tokenizer)},
        num_query_tokens=4,
        **ids(tokenizer, image_token_index="<image>"),
    )  # fmt: skip
    save(config, processor, folder, eos=[eos], **more)


@family("blip-2")
def _blip2_opt(folder: Path) -> None:
    tokenizer = make_tokenizer(pad="<pad>", eos="</s>", bos="</s>", begin="</s>")
    settings = text(tokenizer, "opt", ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH)
    _blip2(folder, tokenizer, settings, eos="Ċ")  # a line break ends an answer, not </s>


@family("blip-2-t5")
def _blip2_t5(folder: Path) -> None:
    tokenizer = make_tokenizer(pad="<pad>", eos="</s>", end="</s>", side="right")
    start = tokenizer.pad_token_id
    settings = {
        "model_type": "t5", "d_model": WIDTH, "d_ff": 2 * WIDTH, "d_kv": 8, "num_heads": 4,
        "num_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "decoder_start_token_id": start, **special(tokenizer),
    }  # fmt: skip
    _blip2(folder, tokenizer, settings, eos="</s>", decoder_start_token_id=start)


@family("git")
def _git(folder: Path) -> None:
    tokenizer = make_tokenizer(
        pad="[PAD]", bos="[CLS]", eos="[SEP]", begin="[CLS]", end="[SEP]", side="right"
    )
    processor = hf.GitProcessor(
        hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE, **CENTRE),
        tokenizer,
    )
    settings = text(tokenizer, "git")
    del settings["model_type"], settings["num_key_value_heads"]
    config = hf.GitConfig(vision_config=vision("git_vision_model"), **settings)
    save(config, processor, folder, eos=["[SEP]"])

"""The sizes of published models that have no recipe: the content of their ``config.json``.

They are enough for a plan. ``tests/test_recipes.py`` compares numbers of parameters with those of
the checkpoints on the hub.
"""

from __future__ import annotations

from typing import Any

SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}


def _llama(hidden: int, wide: int, layers: int, heads: int, words: int, **more: Any) -> Any:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": words,
        **more,
    }


def _idefics(side: int, scale: int, text: Any) -> Any:
    return {
        "model_type": "idefics3",
        "image_token_id": text["vocab_size"] - 2,
        "scale_factor": scale,
        "tie_word_embeddings": False,
        "vision_config": {**SIGLIP, "image_size": side},
        "text_config": text,
    }


def _llava(text: Any) -> Any:
    return {
        "model_type": "llava",
        "image_token_index": 32000,
        "vision_config": CLIP,
        "text_config": text,
    }


def _qwen(hidden: int, wide: int, layers: int, heads: int, groups: int, vision: int) -> Any:
    return {
        "model_type": "qwen2_5_vl",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "max_position_embeddings": 128000,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": vision,
            "out_hidden_size": hidden,
            "num_heads": 16,
        },
    }


FLORENCE_LARGE = {
    "model_type": "florence2",
    "image_token_id": 51289,
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "bart",
        "vocab_size": 51328,
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "florence_vision",
        "depths": [1, 1, 9, 1],
        "embed_dim": [256, 512, 1024, 2048],
        "num_heads": [8, 16, 32, 64],
        "num_groups": [8, 16, 32, 64],
        "window_size": 12,
        "projection_dim": 1024,
    },
}
PALIGEMMA = {
    "model_type": "paligemma",
    "image_token_index": 257152,
    "projection_dim": 2048,
    "vocab_size": 257216,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 257216,
    },
    "vision_config": {
        **SIGLIP,
        "model_type": "siglip_vision_model",
        "image_size": 224,
        "vision_use_head": False,
        "projection_dim": 2048,
    },
}
CONFIGS: dict[str, Any] = {
    "Florence-2-large": FLORENCE_LARGE,
    "paligemma-3b-pt-224": PALIGEMMA,
    "SmolVLM-Instruct": _idefics(384, 3, _llama(2048, 8192, 24, 32, 49155)),
    "Qwen2.5-VL-7B-Instruct": _qwen(3584, 18944, 28, 28, 4, 3420),
    "llava-1.5-7b-hf": _llava(_llama(4096, 11008, 32, 32, 32064)),
    "Idefics3-8B-Llama3": _idefics(
        364, 2, _llama(4096, 14336, 32, 32, 128259, num_key_value_heads=8)
    ),
    "Qwen2.5-VL-32B-Instruct": _qwen(5120, 27648, 64, 40, 8, 3456),
    "Qwen2.5-VL-72B-Instruct": _qwen(8192, 29568, 80, 64, 8, 3456),
}

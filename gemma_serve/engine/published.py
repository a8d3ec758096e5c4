"""The shapes of published Gemmas, as their config.json has them: what decides about memory and speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GEMMA_1 = {
    "model_type": "gemma",
    "architectures": ["GemmaForCausalLM"],
    "vocab_size": 256000,
    "head_dim": 256,
}
_GEMMA_2 = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 256000,
    "head_dim": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
_GEMMA_3_TEXT = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262144,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


def _gemma_3(**shape: Any) -> dict[str, Any]:
    """With its vision tower; `text_config` is the text model's."""
    text = _GEMMA_3_TEXT | {
        "vocab_size": 262208,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    return {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text | shape,
        "vision_config": _SIGLIP,
    }


def _shape(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


PUBLISHED: Mapping[str, dict[str, Any]] = {
    "gemma-2b": _GEMMA_1 | _shape(2048, 16384, 18, 8, 1),
    "gemma-7b": _GEMMA_1 | _shape(3072, 24576, 28, 16, 16),
    "gemma-2-2b": _GEMMA_2 | _shape(2304, 9216, 26, 8, 4),
    "gemma-2-9b": _GEMMA_2 | _shape(3584, 14336, 42, 16, 8),
    "gemma-2-27b": _GEMMA_2
    | _shape(4608, 36864, 46, 32, 16)
    | {"head_dim": 128, "query_pre_attn_scalar": 144},
    "gemma-3-270m": _GEMMA_3_TEXT | _shape(640, 2048, 18, 4, 1),
    "functiongemma-270m": _GEMMA_3_TEXT | _shape(640, 2048, 18, 4, 1),
    "gemma-3-1b": _GEMMA_3_TEXT | _shape(1152, 6912, 26, 4, 1),
    "gemma-3-4b": _gemma_3(**_shape(2560, 10240, 34, 8, 4)),
    "gemma-3-12b": _gemma_3(**_shape(3840, 15360, 48, 16, 8)),
    "gemma-3-27b": _gemma_3(**_shape(5376, 21504, 62, 32, 16), head_dim=128, query_pre_attn_scalar=168),
}
"""By the name at Hugging Face, without `google/` and without `-it`."""


def published(name: str) -> dict[str, Any] | None:
    """The config of `google/gemma-3-4b-it`, `gemma-3-4b` and the like; None where it is not in the table."""
    config = PUBLISHED.get(name.removeprefix("google/").removesuffix("-it").removesuffix("-pt"))
    return None if config is None else {"dtype": "bfloat16", **config}


def text_only(config: dict[str, Any]) -> dict[str, Any]:
    """The same model without its vision tower."""
    if "text_config" not in config:
        return config
    return {"dtype": "bfloat16", **config["text_config"]}

"""What vLLM still knows of a model that is gone: its tokenizers and processors, with their vocabularies."""

from __future__ import annotations

import functools
import sys
from typing import Final

_KEEPERS: Final = (
    "vllm.multimodal",
    "vllm.renderers",
    "vllm.tokenizers",
    "vllm.transformers_utils",
    "vllm.utils.func_utils",  # remembers functions; each tokenizer comes with some of its own
)


def forget_models() -> None:
    """Empty the caches in which tokenizers and processors are kept, or are part of the key."""
    for name, module in list(sys.modules.items()):
        if name.startswith(_KEEPERS):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()

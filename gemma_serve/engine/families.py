"""What each Gemma family needs, in one table: chat template, parsers, number format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True, slots=True)
class Family:
    """`template` None means the model's own; parsers are vLLM's names."""

    name: str
    template: str | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    float16: bool = True
    """Whether its activations fit float16's range; Gemma 2's and 3's do not, and vLLM refuses them."""


_GEMMA_3 = Family("Gemma 3", template="gemma3.jinja", tool_parser="pythonic", float16=False)
_GEMMA_3N = Family("Gemma 3n", template="gemma3.jinja", tool_parser="pythonic", float16=False)
_GEMMA_4 = Family("Gemma 4", tool_parser="gemma4", reasoning_parser="gemma4")
_FUNCTION_GEMMA = Family("FunctionGemma", tool_parser="functiongemma", float16=False)

BY_MODEL_TYPE: Mapping[str, Family] = {
    "gemma": Family("Gemma 1", template="gemma.jinja"),
    "gemma2": Family("Gemma 2", template="gemma.jinja", float16=False),
    "gemma3": _GEMMA_3,
    "gemma3_text": _GEMMA_3,
    "gemma3n": _GEMMA_3N,
    "gemma3n_text": _GEMMA_3N,
    "gemma4": _GEMMA_4,
    "gemma4_text": _GEMMA_4,
    "gemma4_unified": _GEMMA_4,
}
"""By `model_type` of the model's config.json."""

_UNKNOWN = Family("not a Gemma")


def family_of(model_type: str, tokenizer_template: Any = None) -> Family:
    """The family, by the model's type, and for FunctionGemma by what its own chat template writes."""
    # FunctionGemma's config is Gemma 3's; only its tokenizer tells.
    if model_type == "gemma3_text" and "<start_function_call>" in str(tokenizer_template):
        return _FUNCTION_GEMMA
    return BY_MODEL_TYPE.get(model_type, _UNKNOWN)


def template_text(family: Family) -> str | None:
    """Our chat template for the family, or None for the model's own."""
    return None if family.template is None else (_TEMPLATES / family.template).read_text(encoding="utf8")


def precision(wanted: str, family: Family, *, has_bfloat16: bool) -> str:
    """vLLM's `dtype` for the setting: float16 gives way where the family's activations overflow it."""
    if wanted != "float16" or family.float16:
        return wanted
    return "bfloat16" if has_bfloat16 else "float32"

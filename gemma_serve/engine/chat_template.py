"""What a request may tell the model's chat template in `chat_template_kwargs`."""

from __future__ import annotations

import difflib
from typing import Any

from vllm.config import ModelConfig
from vllm.renderers.hf import _cached_resolve_chat_template_kwargs, resolve_chat_template

from ..errors import InvalidRequest

# The renderer's own, or fields of the request: a client that set them here would break or bypass it
# (CVE-2025-62426: `tokenize` and `chat_template`).
_RESERVED = frozenset(
    {
        *("messages", "tools", "documents", "conversation", "chat_template", "tokenize", "tokenizer_kwargs"),
        *("add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now"),
    }
)


class TemplateVariables:
    """What a template reads besides what the renderer gives it, such as Gemma 4's `enable_thinking`.

    `template` None means the model's own.
    """

    def __init__(self, template: str | None, config: ModelConfig, tokenizer: Any) -> None:
        names: set[str] = set()
        tools: list[Any] | None
        for tools in (None, []):  # some models have a template of their own for tools
            text = resolve_chat_template(tokenizer, template, tools, model_config=config)
            names |= _cached_resolve_chat_template_kwargs(text) if text else set()
        self._names = names - _RESERVED - set(tokenizer.special_tokens_map)

    def check(self, given: object) -> None:
        """Raise `InvalidRequest` for what has no effect, which vLLM would drop in silence."""
        if not isinstance(given, dict):
            return  # vLLM says what is wrong with it
        for name, value in given.items():
            # A model that does not think need not be told not to.
            if name in self._names or value is None or (name == "enable_thinking" and value is False):
                continue
            raise InvalidRequest(
                f"'chat_template_kwargs' must not hold {name!r:.100}{self._reason(name)}",
                param="chat_template_kwargs",
            )

    def _reason(self, name: str) -> str:
        if name in _RESERVED:
            return "."
        if near := difflib.get_close_matches(name, self._names, n=1):
            return f"; did you mean {near[0]}?"
        return f": this model's chat template reads {', '.join(sorted(self._names)) or 'nothing from it'}."

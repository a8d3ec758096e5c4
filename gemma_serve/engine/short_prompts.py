"""Short prompts are rendered and tokenized where they are wanted, on the event loop.

vLLM does both in a thread. Below some 2,000 characters the way there and back costs more than the work, and a
busy loop waits for the thread to give the interpreter's lock back. Longer prompts still leave the loop free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from vllm.renderers.base import BaseRenderer
from vllm.renderers.hf import HfRenderer, safe_apply_chat_template

LONGEST: Final = 2_000
"""Characters: tokenized in less than a millisecond."""


def keep_short_prompts_here(renderer: BaseRenderer) -> None:
    # Asked for each request, and looked up by a detour over the tokenizer's __getattr__.
    end_of_text = renderer.get_eos_token_id()
    renderer.get_eos_token_id = lambda: end_of_text
    tokenize = renderer._tokenize_prompt_async
    renderer._tokenize_prompt_async = lambda prompt, params: (
        _done(renderer._tokenize_prompt, prompt, params)
        if len(prompt["prompt"]) <= LONGEST
        else tokenize(prompt, params)
    )
    if isinstance(renderer, HfRenderer):
        apply = renderer._apply_chat_template_async
        renderer._apply_chat_template_async = lambda config, tokenizer, conversation, **options: (
            _done(safe_apply_chat_template, config, tokenizer, conversation, **options)
            if not options.get("tools") and _is_short(conversation)
            else apply(config, tokenizer, conversation, **options)
        )


def _is_short(conversation: list[Any]) -> bool:
    """Texts only. vLLM has parsed it: a content is a string, parts, or nothing."""
    length = 0
    for message in conversation:
        content = message.get("content")
        if message.get("tool_calls"):
            return False
        for part in [content] if isinstance(content, str) else content or [""]:
            text = part if isinstance(part, str) else part.get("text")
            if not isinstance(text, str):
                return False
            length += 20 + len(text)  # an empty one has its markup, or the template's attention
            if length > LONGEST:
                return False
    return True


def _done(work: Callable[..., Any], *args: Any, **options: Any) -> asyncio.Future[Any]:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    try:
        future.set_result(work(*args, **options))
    except Exception as error:
        future.set_exception(error)
    return future

"""Short generations right after a load: what the device does for the first time takes seconds."""

from __future__ import annotations

import asyncio
import logging

from vllm import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

_PROMPT, _TOKENS = "Hello", 8


async def warm_up(llm: AsyncLLM, requests: int) -> None:
    """`requests` at once. One that fails says so in the log: the model may serve all the same."""
    if not requests or llm.model_config.runner_type == "pooling":
        return
    work = (_generate(llm, f"warm-up-{number}") for number in range(requests))
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, Exception):
            logger.warning("A warm-up request failed: %s", outcome)


async def _generate(llm: AsyncLLM, name: str) -> None:
    from vllm.renderers.inputs.preprocess import parse_model_prompt  # not in every version

    (prompt,) = llm.renderer.render_cmpl([parse_model_prompt(llm.model_config, _PROMPT)])
    async for _ in llm.generate(prompt, SamplingParams(max_tokens=_TOKENS, ignore_eos=True), name):
        pass

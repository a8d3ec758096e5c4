"""How many tokens a request may take, before the engine says so, and how many it took, by its answer."""

from __future__ import annotations

from typing import Any

import orjson

from .logs import RequestRecord

BYTES_PER_TOKEN = 4
"""Of English text; an estimate is enough for a limit."""
_PER_MESSAGE = 5  # what a chat template puts around one
_PER_IMAGE = 256  # Gemma 3's
_ANSWER = 256  # where the request does not say how long it may be
_PROMPTS = ("messages", "prompt", "input", "system", "instructions", "tools", "response_format")
_MOST = ("max_completion_tokens", "max_tokens", "max_output_tokens")
# Anthropic's first leaves out the others: https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching.
# OpenAI's has them in it, and tells of them one level below.
_INPUT = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def estimate_tokens(body: dict[str, Any]) -> tuple[int, int]:
    """(prompt, answer) of a request to any of the routes that generate."""
    prompt = sum(_tokens(body[name]) for name in _PROMPTS if name in body)
    # Not the first: a route ignores the others' parameters, with which a client could understate it.
    most = max((body[name] for name in _MOST if isinstance(body.get(name), int)), default=_ANSWER)
    n = body.get("n")
    copies = max(1, n) if isinstance(n, int) else 1
    return prompt, max(0, most) * copies * prompt_count(body)


def prompt_count(body: dict[str, Any], name: str = "prompt") -> int:
    """How many prompts a completion has, or as `input` embeddings."""
    prompt = body.get(name)
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def _tokens(value: Any) -> int:
    """Without recursion: the body is the client's, and nested as it likes."""
    count, length, stack = 0, 0, [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            length += len(item) if item.isascii() else len(item.encode("utf8", "surrogatepass"))
        elif isinstance(item, dict):
            if "role" in item:
                count += _PER_MESSAGE
            if "image_url" in item or item.get("type") in ("image", "input_image"):
                count += _PER_IMAGE  # its data is no text
            else:
                stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif item is not None:
            count += 1  # a token's id
    return count + -(-length // BYTES_PER_TOKEN)


def note_answer(answer: dict[str, Any], record: RequestRecord) -> None:
    """Write into the record what an answer of OpenAI's Responses or Anthropic's Messages says it took."""
    usage = answer.get("usage")
    if isinstance(usage, dict):
        if "input_tokens" in usage:
            record.prompt_tokens = sum(usage.get(name) or 0 for name in _INPUT)
        else:  # of embeddings
            record.prompt_tokens = usage.get("prompt_tokens", record.prompt_tokens)
        record.completion_tokens = usage.get("output_tokens", record.completion_tokens)


def note_event(event: bytes, record: RequestRecord) -> None:
    """As `note_answer`, of a stream. Until an event tells the usage, each delta counts as one token."""
    if b"delta" in event[:80]:
        record.completion_tokens = (record.completion_tokens or 0) + 1
    if b'"usage":{' in event:
        _note_usage(event, record)


def _note_usage(event: bytes, record: RequestRecord) -> None:
    try:
        data = orjson.loads(event.partition(b"data: ")[2])
    except orjson.JSONDecodeError:
        return
    for answer in (data, data.get("response"), data.get("message")):
        if isinstance(answer, dict):
            note_answer(answer, record)

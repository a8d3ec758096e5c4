"""What one request must not cost, checked before the engine sees it; each is a setting of `limits`."""

from __future__ import annotations

from typing import Any

import orjson

from ..errors import InvalidRequest
from ..settings import LimitsSettings

_MAX_TOKENS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_STOPS = ("stop", "stop_sequences", "stop_token_ids", "bad_words")
_SCHEMAS = ("response_format", "structured_outputs", "text", "tools")
_IMAGE_TYPES = ("image_url", "input_image", "image", "image_embeds")


def check_caps(body: dict[str, Any], limits: LimitsSettings) -> None:
    """A body of any route that generates, not yet validated. Raises `InvalidRequest` with what to change."""
    _at_most(body, "n", limits.max_n, "answers at once")
    n = body.get("n") if type(body.get("n")) is int else 1
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    if prompts * (n or 1) > limits.max_sequences:
        raise InvalidRequest(
            f"{prompts} prompts times {n} answers are {prompts * (n or 1)}; at most {limits.max_sequences} "
            "at once.",
            param="prompt",
        )
    for name in ("top_logprobs", "logprobs", "prompt_logprobs"):
        value = body.get(name)
        if type(value) is int and not 0 <= value <= limits.max_logprobs:
            raise InvalidRequest(
                f"'{name}' is {value}; it must be between 0 and {limits.max_logprobs}.",
                param=name,
                code="invalid_value",
            )
    if limits.max_tokens:
        for name in _MAX_TOKENS:
            _at_most(body, name, limits.max_tokens, "tokens of an answer")
    for name in _STOPS:
        most = limits.max_stop if "stop" in name and "ids" not in name else limits.max_word_lists
        _few(body, name, most)
    _few(body, "tools", limits.max_tools)
    for name in _SCHEMAS:
        if isinstance(body.get(name), dict | list):
            _small(name, body[name], limits.max_schema_bytes)
    images = _images(body.get("messages")) + _images(body.get("input"))
    if images > limits.max_images:
        raise InvalidRequest(f"There are {images} images; at most {limits.max_images}.", param="messages")


def default_length(body: dict[str, Any], limits: LimitsSettings, name: str = "max_tokens") -> None:
    """Where the request does not say how long its answer may be, the setting does."""
    if limits.max_tokens and not any(body.get(other) is not None for other in _MAX_TOKENS):
        body[name] = limits.max_tokens


def _at_most(body: dict[str, Any], name: str, most: int, what: str) -> None:
    value = body.get(name)
    if type(value) is int and value > most:
        raise InvalidRequest(f"'{name}' is {value}; at most {most} {what}.", param=name, code="invalid_value")


def _few(body: dict[str, Any], name: str, most: int) -> None:
    value = body.get(name)
    if isinstance(value, list) and len(value) > most:
        message = f"Invalid value for '{name}': should have at most {most} items, got {len(value):,}."
        raise InvalidRequest(message, param=name, code="invalid_value")


def _small(name: str, schema: Any, most: int) -> None:
    size = len(orjson.dumps(schema))
    if size > most:
        raise InvalidRequest(
            f"'{name}' is {size:,} bytes of JSON; at most {most:,}.", param=name, code="invalid_value"
        )


def _images(messages: Any) -> int:
    if not isinstance(messages, list):
        return 0
    count = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else [message]
        count += sum(isinstance(part, dict) and part.get("type") in _IMAGE_TYPES for part in parts)
    return count

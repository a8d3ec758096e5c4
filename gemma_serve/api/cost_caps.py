"""What one request must not cost, checked before the engine sees it; each is a setting of `limits`."""

from __future__ import annotations

from typing import Any

import orjson

from ..errors import InvalidRequest
from ..settings import LimitsSettings
from ..token_usage import prompt_count

_MAX_TOKENS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_STOPS = ("stop", "stop_sequences", "stop_token_ids", "bad_words")
_MAPPINGS = ("logit_bias", "metadata", "vllm_xargs")
_MOST_ENTRIES = 1024
_SCHEMAS = ("response_format", "structured_outputs", "text", "tools")
_CAPPED = {"n", "top_logprobs", "logprobs", "prompt_logprobs", *_STOPS, *_MAPPINGS, *_SCHEMAS}
_IMAGE_TYPES = ("image_url", "input_image", "image", "image_embeds")
_PARTS = ("content", "output")  # that may hold images


def check_caps(body: dict[str, Any], limits: LimitsSettings) -> None:
    """A body of any route that generates, not yet validated. Raises `InvalidRequest` with what to change."""
    if not _CAPPED.isdisjoint(body):  # few requests have any
        _check_fields(body, limits)
    if limits.max_tokens:
        for name in _MAX_TOKENS:
            _at_most(body, name, limits.max_tokens, "tokens of an answer")
    n, prompts = _integer(body, "n") or 1, prompt_count(body)
    if prompts * n > limits.max_sequences:
        raise InvalidRequest(
            f"{prompts} prompts times {n} answers are {prompts * n}; at most {limits.max_sequences} at once.",
            param="prompt",
        )
    for name in ("messages", "input"):
        if name in body and (images := _images(body[name])) > limits.max_images:
            raise InvalidRequest(f"There are {images} images; at most {limits.max_images}.", param=name)


def _check_fields(body: dict[str, Any], limits: LimitsSettings) -> None:
    _at_most(body, "n", limits.max_n, "answers at once")
    for name in ("top_logprobs", "logprobs", "prompt_logprobs"):
        value = _integer(body, name)
        if value is not None and not 0 <= value <= limits.max_logprobs:
            raise InvalidRequest(
                f"'{name}' is {value}; it must be between 0 and {limits.max_logprobs}.",
                param=name,
                code="invalid_value",
            )
    for name in _STOPS:
        most = limits.max_stop if "stop" in name and "ids" not in name else limits.max_word_lists
        _few(body, name, most)
    for name in _MAPPINGS:
        _few(body, name, _MOST_ENTRIES)
    _few(body, "tools", limits.max_tools)
    for name in _SCHEMAS:
        if isinstance(body.get(name), dict | list):
            _small(name, body[name], limits.max_schema_bytes)


def default_length(body: dict[str, Any], limits: LimitsSettings, name: str = "max_tokens") -> None:
    """Where the request does not say how long its answer may be, the setting does.

    `name` is the route's own parameter: another route's has no effect here, also not on this.
    """
    newer = "max_completion_tokens" if name == "max_tokens" else name
    if limits.max_tokens and body.get(name) is None and body.get(newer) is None:
        body[name] = limits.max_tokens


def _at_most(body: dict[str, Any], name: str, most: int, what: str) -> None:
    value = _integer(body, name)
    if value is not None and value > most:
        raise InvalidRequest(f"'{name}' is {value}; at most {most} {what}.", param=name, code="invalid_value")


def _integer(body: dict[str, Any], name: str) -> int | None:
    """Of 9.0 or "9", which are refused, vLLM would make a number after these checks."""
    value = body.get(name)
    if isinstance(value, str | float):
        raise InvalidRequest(
            f"Invalid value for '{name}': should be a valid integer, got {value!r:.50}.",
            param=name,
            code="invalid_type",
        )
    return value if type(value) is int else None


def _few(body: dict[str, Any], name: str, most: int) -> None:
    value = body.get(name)
    if isinstance(value, list | dict) and len(value) > most:
        message = f"Invalid value for '{name}': should have at most {most} items, got {len(value):,}."
        raise InvalidRequest(message, param=name, code="invalid_value")


def _small(name: str, schema: Any, most: int) -> None:
    size = len(orjson.dumps(schema))
    if size > most:
        raise InvalidRequest(
            f"'{name}' is {size:,} bytes of JSON; at most {most:,}.", param=name, code="invalid_value"
        )


def _images(messages: Any) -> int:
    """Also those in what a tool answered, and parts that name an image but no type."""
    count, stack = 0, [messages]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack += item
        elif isinstance(item, dict):
            if item.get("type") in _IMAGE_TYPES or "image_url" in item:
                count += 1
            else:
                stack += [part for name in _PARTS if isinstance(part := item.get(name), list | dict)]
    return count

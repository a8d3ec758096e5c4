"""Which answer belongs to which question: whose, of which model, and all of the request."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import orjson

from ..clients import Client
from ..engine.base import GenerationRequest, LoadedModel

VERSION = 2
"""Of the key and of what is stored under it: one that changes either leaves the old entries to expire."""
SHARED = "shared"
"""The tenant of all who share; a client's id has a colon, so none is like it."""

_GREEDY = 1e-5  # vLLM samples greedily below this temperature
_EXACT = 2.0**53

# What cannot change the answer. Everything else is in the key, also what nobody has thought of; the API has
# dropped what has no effect at all (`user`, `metadata`, …) before.
_NOT_IN_THE_KEY = frozenset(
    {
        "model",  # an alias, perhaps: the key has the served name
        "request_id",  # only a name: an answer from the cache gets that of who asks
        "stream",  # either form is made of the other, but see below
        "stream_options",  # see `_stream_options`
    }
)
# With these the forms differ in more than form, or vLLM refuses one of them.
_FORM_MATTERS = frozenset(
    {
        "echo",
        "kv_transfer_params",
        "ec_transfer_params",
        "prompt_logprobs",
        "return_prompt_text",
        "return_token_ids",
        "tools",  # vLLM parses a whole answer otherwise than a growing one
        "use_beam_search",
    }
)
_WITHOUT_MEDIA = ("text", "input_text", "output_text", "refusal", "thinking")


class CacheKey(NamedTuple):
    tenant: str
    """A client's id, or `SHARED`."""
    model: str
    digest: bytes
    """SHA-256 of everything, the other two included."""

    def is_of(self, tenant: str | None, model: str | None) -> bool:
        """None is any."""
        return tenant in (None, self.tenant) and model in (None, self.model)


def tenant_of(client: Client | None, sharing: Collection[str]) -> str:
    """Whose answers `client` gets; `sharing` are the names of keys that share theirs, `*` for everybody."""
    if "*" in sharing or (client is not None and client.key is not None and client.key in sharing):
        return SHARED
    return client.id if client is not None else "none:"


def key_of(request: GenerationRequest, tenant: str, model: LoadedModel) -> CacheKey:
    """No tokens are counted for it: it costs some microseconds, and one a kilobyte.

    The order of the body's own fields says nothing; within them it may, as that of a schema's properties.
    """
    body = [
        (name, _number(value) if type(value) is float else value)
        for name, value in sorted(request.body.items())
        if name not in _NOT_IN_THE_KEY
    ]
    streamed = bool(request.body.get("stream"))
    form = streamed if not _FORM_MATTERS.isdisjoint(request.body) else None
    options = _stream_options(request.body.get("stream_options"), streamed)
    question = [VERSION, tenant, request.model, model.identity, request.kind, form, options, body]
    return CacheKey(tenant, request.model, hashlib.sha256(orjson.dumps(question)).digest())


def is_deterministic(body: Mapping[str, Any], model: LoadedModel) -> bool:
    """Would the engine give the same answer again?"""
    temperature = body.get("temperature", model.temperature)
    greedy = isinstance(temperature, int | float) and temperature < _GREEDY
    seeded = body.get("seed", -1) != -1  # vLLM takes -1 for no seed
    return (greedy or seeded) and not _names_media(body)


def _number(value: float) -> float | int:
    """1.0 is 1."""
    return int(value) if value.is_integer() and abs(value) < _EXACT else value


def _stream_options(options: Any, streamed: bool) -> Any:
    """Whether a stream tells its usage is up to who writes it; without a stream vLLM refuses them."""
    if not streamed or not isinstance(options, dict):
        return options or None
    return {name: value for name, value in options.items() if name != "include_usage" and value} or None


def _names_media(body: Mapping[str, Any]) -> bool:
    """Do the messages name media that are not in the request, and may be others tomorrow?"""
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(map(_looks_elsewhere, content)):
            return True
    return False


def _looks_elsewhere(part: Any) -> bool:
    if not isinstance(part, dict) or part.get("type") in _WITHOUT_MEDIA:
        return False
    inner = [item for value in part.values() if isinstance(value, dict) for item in value.values()]
    named = (value for value in (*part.values(), *inner) if isinstance(value, str))
    return bool(part.get("uuid")) or any("://" in value[:16] for value in named)

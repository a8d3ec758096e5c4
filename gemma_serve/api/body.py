"""Request bodies: JSON read once with orjson, validated, and what clients get wrong put in a sentence."""

from __future__ import annotations

import reprlib
from typing import Any, NamedTuple, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from ..engine.base import CacheUse
from ..errors import InvalidRequest, UnsupportedMediaType, field_path
from ..settings import Settings
from .streaming import Patience

S = TypeVar("S", bound=BaseModel)


async def read_body(request: Request, schema: type[S], max_depth: int) -> S:
    """Raises `InvalidRequest`, `UnsupportedMediaType`."""
    require_json(request)
    return validated(schema, parse_json(await read_bytes(request), max_depth))


async def read_bytes(request: Request) -> bytes:
    """The whole body, once. Starlette's `body` does it through two generators, at ten times the cost."""
    parts = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def header(request: Request, name: bytes) -> str | None:
    """The first header of that name, in lower case."""
    for known, value in request.scope["headers"]:
        if known == name:
            return str(value.decode("latin-1"))
    return None


def validated(schema: type[S], body: dict[str, Any]) -> S:
    """Raises `InvalidRequest` with the first fault."""
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise _explain(error) from error


def body_size(request: Request) -> int:
    """In bytes, as announced; 0 when it was not, as with chunks."""
    length = header(request, b"content-length") or ""
    return int(length) if length.isascii() and length.isdigit() else 0


def patience_of(request: Request, settings: Settings) -> Patience:
    """The server's limits, and the client's own in `X-Request-Timeout`. Raises `InvalidRequest`."""
    deadline = settings.limits.request_timeout_seconds or None
    if (text := header(request, b"x-request-timeout")) is not None:
        try:
            wanted = float(text)
        except ValueError:
            wanted = 0
        if not 0 < wanted < float("inf"):
            raise InvalidRequest(f"X-Request-Timeout must be a number of seconds above 0, got {text!r:.100}.")
        deadline = wanted if deadline is None else min(wanted, deadline)
    return Patience(settings.server.keep_alive_seconds or None, deadline)


def cache_use(request: Request) -> CacheUse:
    """By `Cache-Control`: `no-store` leaves the cache out, `no-cache` wants an answer made now."""
    if (text := header(request, b"cache-control")) is None:
        return "use"
    directives = {directive.strip().lower() for directive in text.split(",")}
    return "off" if "no-store" in directives else "refresh" if "no-cache" in directives else "use"


def require_json(request: Request) -> None:
    content_type = header(request, b"content-type")
    if content_type is not None and not _is_json(content_type):
        raise UnsupportedMediaType(
            f"Content-Type is {content_type!r:.100}; send JSON with 'Content-Type: application/json'."
        )


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or media_type.endswith("+json")


def parse_json(raw: bytes, max_depth: int, what: str = "request body") -> dict[str, Any]:
    """A JSON object. orjson refuses invalid UTF-8, lone surrogates and NaN."""
    if not raw:
        raise InvalidRequest(f"The {what} is empty; send a JSON object.")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The {what} is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(body, dict):
        raise InvalidRequest(f"The {what} must be a JSON object, not {_JSON_NAMES[type(body)]}.")
    if raw.count(b"{") + raw.count(b"[") > max_depth and _deeper(body, max_depth):
        raise InvalidRequest(f"The {what} is nested deeper than {max_depth} levels.", code="invalid_json")
    # C code below the tokenizers takes NUL for the end of text. The search costs little next to parsing.
    if b"\\u0000" in raw and (path := _nul_path(body)) is not None:
        raise InvalidRequest(f"'{path}' holds a NUL character (U+0000); remove it.", param=path)
    return body


_JSON_NAMES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


def _deeper(body: dict[str, Any], depth: int) -> bool:
    """Is it nested deeper than that? Level by level, so that no input makes it recurse."""
    level: list[Any] = [body]
    for _ in range(depth):
        level = [
            child
            for item in level
            for child in (item.values() if type(item) is dict else item)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return False
    return True


def _nul_path(body: dict[str, Any]) -> str | None:
    """Where a NUL stands. Only the path that is told is built: one for each item could take any memory."""
    stack: list[_Node] = [_Node(None, "", body)]
    while stack:
        node = stack.pop()
        value = node.value
        if isinstance(value, str):
            if "\0" in value:
                return node.path()
        elif isinstance(value, dict):
            if any("\0" in key for key in value):
                return node.path() or "body"
            stack += [_Node(node, key, item) for key, item in value.items() if isinstance(item, _HOLDERS)]
        elif isinstance(value, list):
            stack += [
                _Node(node, index, item) for index, item in enumerate(value) if isinstance(item, _HOLDERS)
            ]
    return None


_HOLDERS = (str, dict, list)


class _Node(NamedTuple):
    parent: _Node | None
    key: int | str
    value: Any

    def path(self) -> str:
        parts: list[int | str] = []
        node: _Node | None = self
        while node is not None and node.parent is not None:
            parts.append(node.key)
            node = node.parent
        return field_path(tuple(reversed(parts)))


def _explain(error: ValidationError) -> InvalidRequest:
    """The first fault, as OpenAI words it, with the field's path in `param`."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    path = field_path(fault["loc"])
    if fault["type"] == "missing":
        return InvalidRequest(
            f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter"
        )
    if fault["type"] == "extra_forbidden":
        return InvalidRequest(f"Unknown parameter: '{path:.100}'.", param=path, code="unknown_parameter")
    # A union fails once for each of its branches; the client may send any of them.
    wanted = " or ".join(
        dict.fromkeys(_wanted(other) for other in faults if field_path(other["loc"]) == path)
    )
    given = reprlib.repr(fault["input"])  # bounded in depth and length
    code = "invalid_type" if fault["type"].endswith("_type") else "invalid_value"
    return InvalidRequest(f"Invalid value for '{path}': {wanted}, got {given}.", param=path, code=code)


def _wanted(fault: ErrorDetails) -> str:
    match fault["type"]:
        case "too_short":
            return f"should have at least {fault['ctx']['min_length']} item"
        case "string_too_short" | "string_too_long":
            return str(fault["msg"]).replace("String should", "should")
        case "model_type" | "dict_type":
            return "should be an object"
        case "list_type":
            return "should be an array"
        case "value_error":
            return str(fault["msg"]).removeprefix("Value error, ")
    return (
        str(fault["msg"])
        .replace("Input should be a valid", "should be a valid")
        .replace("Input should", "should")
    )

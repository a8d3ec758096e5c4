"""`/v1/responses`, `/v1/messages`, `/v1/embeddings`, `/tokenize` and `/detokenize`: vLLM's own handlers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine.base import RelayKind
from ..errors import InvalidRequest, ServeError
from ..generation import Generator, RelayedEvents
from ..logs import current_request
from ..models import Models
from ..settings import Settings
from .body import body_size, parse_json, patience_of, read_bytes, require_json
from .cost_caps import check_caps, default_length
from .docs import EVENTS, any_body, errors
from .request_route import RequestRoute
from .schemas import AnthropicError
from .streaming import EVENT_STREAM_HEADERS, Patience, StreamedResponse, until_disconnect


class RelayedStream(StreamedResponse):
    """The events as they come."""

    def __init__(self, open: Callable[[], Awaitable[Any]], patience: Patience) -> None:
        super().__init__(EVENT_STREAM_HEADERS, patience)
        self._open = open

    async def run(self) -> bytes:
        events: RelayedEvents = await self._open()
        try:
            async for event in events:
                await self.emit(event)
        finally:
            await events.aclose()
        return b""

    def render_error(self, error: ServeError) -> bytes:
        event = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"


class AnthropicStream(RelayedStream):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ServeError as error:
            await _anthropic_response(error)(scope, receive, send)

    def render_error(self, error: ServeError) -> bytes:
        return b"event: error\ndata: " + orjson.dumps(error.anthropic_body()) + b"\n\n"


def _anthropic_response(error: ServeError) -> Response:
    body = orjson.dumps(error.anthropic_body())
    return Response(body, error.status, error.headers, "application/json")


class _Route(NamedTuple):
    kind: RelayKind
    path: str
    tag: str
    summary: str
    description: str
    body: str
    """Where the body is described."""
    streams: type[RelayedStream] | None = None
    anthropic: bool = False


_OPENAI = "https://platform.openai.com/docs/api-reference"
_ANTHROPIC = "https://docs.anthropic.com/en/api/messages"
_ROUTES = (
    _Route(
        "responses",
        "/v1/responses",
        "generation",
        "OpenAI's Responses API",
        "Stateless: answers are not stored, so `previous_response_id` finds nothing.",
        f"{_OPENAI}/responses/create",
        RelayedStream,
    ),
    _Route(
        "messages",
        "/v1/messages",
        "generation",
        "Anthropic's Messages API",
        "For clients of Anthropic's SDK; errors have Anthropic's shape here.",
        _ANTHROPIC,
        AnthropicStream,
        anthropic=True,
    ),
    _Route(
        "count_tokens",
        "/v1/messages/count_tokens",
        "generation",
        "Count a message's tokens",
        "As Anthropic's SDK asks for them.",
        _ANTHROPIC,
        anthropic=True,
    ),
    _Route(
        "embeddings",
        "/v1/embeddings",
        "embeddings",
        "Text to vectors",
        "Where the model embeds, such as EmbeddingGemma; others answer 400.",
        f"{_OPENAI}/embeddings/create",
    ),
    _Route(
        "tokenize",
        "/tokenize",
        "tokens",
        "Text or messages to token ids",
        "`prompt`, or `messages` with the chat template applied.",
        "`prompt`, or `messages`",
    ),
    _Route("detokenize", "/detokenize", "tokens", "Token ids to text", "The text of `tokens`.", "`tokens`"),
)


def router(generator: Generator, models: Models, settings: Settings) -> APIRouter:
    relay = _Relay(generator, models, settings)
    routes = APIRouter(route_class=RequestRoute)
    for route in _ROUTES:
        known = errors(404, 413, 415)
        if route.anthropic:
            known = {status: {"model": AnthropicError} for status in known}
        events: dict[int | str, Any] = {200: {"content": EVENTS}} if route.streams else {}
        routes.add_api_route(
            route.path,
            relay.endpoint(route),
            methods=["POST"],
            tags=[route.tag],
            name=route.kind,
            summary=route.summary,
            description=route.description,
            responses=known | events,
            openapi_extra=any_body(route.body),
        )
    return routes


class _Relay:
    def __init__(self, generator: Generator, models: Models, settings: Settings) -> None:
        self._generator = generator
        self._models = models
        self._settings = settings

    def endpoint(self, route: _Route) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                return await self._answer(route, request)
            except ServeError as error:
                if route.anthropic:
                    return _anthropic_response(error)
                raise

        return endpoint

    async def _answer(self, route: _Route, request: Request) -> Response:
        generator, limits = self._generator, self._settings.limits
        generator.require_room(body_size(request))
        patience = patience_of(request, self._settings)
        require_json(request)
        raw = await read_bytes(request)
        body = parse_json(raw, limits.max_json_depth)
        check_caps(body, limits)
        if route.kind == "responses":
            default_length(body, limits, "max_output_tokens")
        if type(stream := body.get("stream") or False) is not bool:  # vLLM would take 1 or "true" for true
            raise InvalidRequest(
                f"Invalid value for 'stream': should be a boolean, got {stream!r:.50}.",
                param="stream",
                code="invalid_type",
            )
        if not isinstance(model := body.get("model"), str | None):
            raise InvalidRequest(
                f"Invalid value for 'model': should be a valid string, got {model!r:.50}.",
                param="model",
                code="invalid_type",
            )
        body["model"] = self._models.resolve(model)
        if (record := current_request.get()) is not None:
            record.model = body["model"]

        async def work() -> Any:
            return await generator.relay(route.kind, body, len(raw))

        if stream and route.streams is not None:
            return route.streams(work, patience)
        answer = await until_disconnect(request.receive, work(), patience.deadline)
        return Response(orjson.dumps(answer), media_type="application/json")

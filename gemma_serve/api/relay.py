"""`/v1/responses`, `/v1/messages`, `/v1/embeddings`, `/tokenize` and `/detokenize`: vLLM's own handlers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

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
from .body import body_size, parse_json, patience_of, require_json
from .cost_caps import check_caps, default_length
from .docs import EVENTS, any_body, errors
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


_STREAMS = {"responses": RelayedStream, "messages": AnthropicStream}


def router(generator: Generator, models: Models, settings: Settings) -> APIRouter:
    limits = settings.limits
    routes = APIRouter()

    async def relay(kind: RelayKind, request: Request) -> Response:
        size = body_size(request)
        generator.require_room(size)
        patience = patience_of(request, settings)
        require_json(request)
        raw = await request.body()
        size = len(raw)
        body = parse_json(raw, limits.max_json_depth)
        check_caps(body, limits)
        if kind == "responses":
            default_length(body, limits, "max_output_tokens")
        if type(stream := body.get("stream") or False) is not bool:  # vLLM would take 1 or "true" for true
            raise InvalidRequest(
                f"Invalid value for 'stream': should be a boolean, got {stream!r:.50}.",
                param="stream",
                code="invalid_type",
            )
        body["model"] = models.resolve(body.get("model"))
        record = current_request.get()
        if record is not None:
            record.model = body["model"]

        async def work() -> Any:
            return await generator.relay(kind, body, size)

        if stream and kind in _STREAMS:
            return _STREAMS[kind](work, patience)
        answer = await until_disconnect(request.receive, work(), patience.deadline)
        return Response(orjson.dumps(answer), media_type="application/json")

    async def anthropic(kind: RelayKind, request: Request) -> Response:
        try:
            return await relay(kind, request)
        except ServeError as error:
            return _anthropic_response(error)

    anthropics: dict[str, Any] = {
        "responses": {200: {"content": EVENTS}}
        | {status: {"model": AnthropicError} for status in (404, 413, 415)},
        "openapi_extra": any_body("https://docs.anthropic.com/en/api/messages"),
    }

    @routes.post(
        "/v1/responses",
        tags=["generation"],
        summary="OpenAI's Responses API",
        responses=errors(404, 413, 415) | {200: {"content": EVENTS}},
        openapi_extra=any_body("https://platform.openai.com/docs/api-reference/responses/create"),
    )
    async def responses(request: Request) -> Any:
        """Stateless: answers are not stored, so `previous_response_id` finds nothing."""
        return await relay("responses", request)

    @routes.post("/v1/messages", tags=["generation"], summary="Anthropic's Messages API", **anthropics)
    async def messages(request: Request) -> Any:
        """For clients of Anthropic's SDK; errors have Anthropic's shape here."""
        return await anthropic("messages", request)

    @routes.post(
        "/v1/messages/count_tokens", tags=["generation"], summary="Count a message's tokens", **anthropics
    )
    async def count_tokens(request: Request) -> Any:
        return await anthropic("count_tokens", request)

    @routes.post(
        "/v1/embeddings",
        tags=["embeddings"],
        summary="Text to vectors",
        responses=errors(404, 413, 415),
        openapi_extra=any_body("https://platform.openai.com/docs/api-reference/embeddings/create"),
    )
    async def embeddings(request: Request) -> Any:
        """Where the model embeds, such as EmbeddingGemma; others answer 400."""
        return await relay("embeddings", request)

    @routes.post(
        "/tokenize",
        tags=["tokens"],
        summary="Text or messages to token ids",
        responses=errors(404, 413, 415),
        openapi_extra=any_body("`prompt`, or `messages`"),
    )
    async def tokenize(request: Request) -> Any:
        """`prompt`, or `messages` with the chat template applied."""
        return await relay("tokenize", request)

    @routes.post(
        "/detokenize",
        tags=["tokens"],
        summary="Token ids to text",
        responses=errors(404, 413, 415),
        openapi_extra=any_body("`tokens`"),
    )
    async def detokenize(request: Request) -> Any:
        return await relay("detokenize", request)

    return routes

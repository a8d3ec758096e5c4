"""`/v1/responses`, `/v1/messages`, `/tokenize` and `/detokenize`: vLLM's own handlers behind our routes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine.base import Engine, RelayKind
from ..errors import ServeError
from ..generation import Generator
from ..logs import current_request
from ..models import Models
from ..settings import LimitsSettings
from .body import parse_json, require_json
from .cost_caps import check_caps, default_length
from .docs import EVENTS, any_body, errors
from .schemas import AnthropicError
from .streaming import EVENT_STREAM_HEADERS, ClientDisconnected, until_disconnect


class RelayedStream(Response):
    """Sends the events as they come; the status with the first, so that an early failure has its own."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self.background = None
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnected):
            await until_disconnect(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        started = False
        async for event in self._events:
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEADERS})
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if not started:
            raise ServeError("The engine ended the answer without an event; the server's log says why.")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def router(generator: Generator, engine: Engine, models: Models, limits: LimitsSettings) -> APIRouter:
    routes = APIRouter()

    async def relay(kind: RelayKind, request: Request) -> Response:
        engine.status.require_ready()
        require_json(request)
        body = parse_json(await request.body(), limits.max_json_depth)
        check_caps(body, limits)
        if kind == "responses":
            default_length(body, limits, "max_output_tokens")
        body["model"] = models.resolve(body.get("model"))
        if (record := current_request.get()) is not None:
            record.model = body["model"]
        answer = await until_disconnect(request.receive, generator.relay(kind, body))
        if isinstance(answer, dict):
            return Response(orjson.dumps(answer), media_type="application/json")
        return RelayedStream(answer)

    async def anthropic(kind: RelayKind, request: Request) -> Response:
        try:
            return await relay(kind, request)
        except ServeError as error:
            body = orjson.dumps(error.anthropic_body())
            return Response(body, error.status, error.headers, "application/json")

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

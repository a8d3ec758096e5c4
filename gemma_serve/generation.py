"""One generation from request to usage: which model, is it ready, the engine, the accounting."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from .engine.base import Delta, Engine, GenerationRequest, TokenStream, Usage
from .models import Models

Kind = Literal["chat", "completion"]


@dataclass(slots=True)
class Record:
    """What is known of a request's generation, for its log line and metrics."""

    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    time_to_first_token: float | None = None
    """Seconds from the validated request to the first text."""

    def count(self, usage: Usage) -> None:
        self.prompt_tokens, self.completion_tokens = usage.prompt_tokens, usage.completion_tokens


class Generator:
    """Runs requests on the engine. Raises `ServeError`; cancelling or closing stops the engine's work."""

    def __init__(self, engine: Engine, models: Models) -> None:
        self._engine = engine
        self._models = models

    async def complete(
        self, kind: Kind, body: dict[str, Any], request_id: str, record: Record
    ) -> dict[str, Any]:
        """The whole answer in OpenAI's shape."""
        request = self._request(kind, body, request_id, record)
        answer, usage = await self._engine.complete(request)
        record.count(usage)
        return answer

    async def stream(
        self, kind: Kind, body: dict[str, Any], request_id: str, record: Record
    ) -> RecordedStream:
        """The answer as it comes."""
        request = self._request(kind, body, request_id, record)
        started = time.perf_counter()
        return RecordedStream(await self._engine.stream(request), record, started)

    def _request(
        self, kind: Kind, body: dict[str, Any], request_id: str, record: Record
    ) -> GenerationRequest:
        record.model = self._models.resolve(body.get("model"))
        self._engine.status.require_ready()
        return GenerationRequest(kind, body, request_id, record.model)


class RecordedStream:
    """A `TokenStream` that writes its times and counts into a `Record`."""

    def __init__(self, stream: TokenStream, record: Record, started: float) -> None:
        self.tokens = stream
        self._record = record
        self._started = started

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        record = self._record
        async for deltas in self.tokens:
            if record.time_to_first_token is None:
                record.time_to_first_token = time.perf_counter() - self._started
            yield deltas

    async def aclose(self) -> None:
        """Stop the generation if it still runs. Call it however the iteration ended."""
        await self.tokens.aclose()
        self._record.count(self.tokens.usage)

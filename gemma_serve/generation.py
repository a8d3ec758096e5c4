"""One generation from request to usage: token quota, admission, the engine, the accounting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

import orjson

from .admission import Admission, Slot
from .cache import Answer, Origin, RepeatedHit
from .clients import current_client
from .engine.base import Engine, GenerationRequest, RelayKind, Sink, StreamHead, TokenStream
from .errors import ServeError
from .garbage import Bodies
from .logs import RequestRecord, current_request
from .metrics import Inference, Metrics
from .models import Models
from .rate_limit import abandon, reserve_tokens
from .token_usage import estimate_tokens, note_answer, note_event, prompt_count
from .tracing import phase

_WITHOUT_ENGINE = {"tokenize", "detokenize", "count_tokens", "count"}
_TOKENIZED_AT_ONCE = 4  # vLLM's tokenizer has one thread: the others wait, each client in its turn


class Generator:
    """Runs requests on the engine. Raises `ServeError`; cancelling or closing stops the engine's work."""

    def __init__(self, engine: Engine, models: Models, admission: Admission, metrics: Metrics) -> None:
        self._engine = engine
        self._models = models
        self._admission = admission
        self._tokenizing = admission.beside(_TOKENIZED_AT_ONCE)
        self._metrics = metrics
        self._bodies = Bodies()

    def require_room(self, body_bytes: int) -> None:
        """Refuse what could not be served before its body is read."""
        self._models.require_open()
        self._admission.require_room(body_bytes)

    def repeated(self, origin: Origin) -> RepeatedHit | None:
        """The answer, where these very bytes have had it before. Raises as `Models.resolve`."""
        return None

    def prepare(self, request: GenerationRequest) -> Generation:
        """Its answer, which nothing is done for yet."""
        return Generation(self, request)

    async def complete(self, request: GenerationRequest) -> dict[str, Any]:
        """The whole answer in OpenAI's shape."""
        work = await self._enter(request.body, request.size, request.model, request.answers)
        try:
            answer, usage = await self._engine.complete(request)
            work.succeeded(usage.prompt_tokens, usage.completion_tokens)
        except asyncio.CancelledError:
            abandon()
            raise
        except Exception as error:
            work.failed(error)
            raise
        finally:
            work.leave()
        if (record := current_request.get()) is not None:
            record.prompt_tokens, record.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        return answer

    async def stream(self, request: GenerationRequest) -> Delivery:
        """The answer as it comes."""
        return await self.generate(request)

    async def generate(self, request: GenerationRequest) -> RecordedStream:
        """What the engine streams for this request alone."""
        started = time.perf_counter()
        work = await self._enter(request.body, request.size, request.model, request.answers)
        try:
            return RecordedStream(await self._engine.stream(request), started, work)
        except BaseException as error:
            work.failed(error)
            work.leave()
            raise

    async def relay(self, kind: RelayKind, body: dict[str, Any], size: int) -> dict[str, Any] | RelayedEvents:
        """What vLLM's own handler of another API answers, whole or as server-sent events."""
        if kind in _WITHOUT_ENGINE:
            return await self._tokenize(kind, body, size)
        answers = prompt_count(body, "input") if kind == "embeddings" else 1
        work = await self._enter(body, size, body["model"], answers)
        try:
            answer = await self._engine.relay(kind, body)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                abandon()
            work.failed(error)
            work.leave()
            raise
        record = current_request.get() or RequestRecord("")
        if not isinstance(answer, dict):
            return RelayedEvents(answer, work, record)
        note_answer(answer, record)
        work.succeeded(record.prompt_tokens, record.completion_tokens)
        work.leave()
        return answer

    async def _tokenize(self, kind: RelayKind, body: dict[str, Any], size: int) -> dict[str, Any]:
        self._bodies.add(size)
        await self._models.enter(body["model"], size)
        try:
            slot = await self._tokenizing.enter(size, 1, current_client.get())
            try:
                answer = await self._engine.relay(kind, body)
            finally:
                slot.leave()
        finally:
            self._models.leave()
        assert isinstance(answer, dict)
        return answer

    async def _enter(self, body: dict[str, Any], size: int, model: str, answers: int = 1) -> Work:
        started = time.perf_counter()
        self._bodies.add(size)
        await self._models.enter(model, size)
        try:
            await reserve_tokens(lambda: estimate_tokens(body))
            client = current_client.get()
            measures = Inference(self._metrics, model, client.key if client else None, answers)
            slot = await self._admission.enter(size, answers, client)
        except BaseException:
            self._models.leave()
            raise
        measures.admitted()
        phase("queue", started)
        return Work(slot, self._models, measures)


class Delivery(Protocol):
    """An answer on its way to one client."""

    @property
    def tokens(self) -> StreamHead: ...

    async def feed(self, sink: Sink) -> None:
        """Give `sink` everything as it comes. Whoever calls it notes the first token. Raises `ServeError`."""
        ...

    def note_first_token(self) -> None: ...

    async def aclose(self) -> None:
        """Stop the generation if it still runs, and nobody else wants it. Call it however the rest ended."""
        ...


class Generation:
    """The answer to one request: take it whole or as a stream, once."""

    def __init__(self, generator: Generator, request: GenerationRequest) -> None:
        self._generator = generator
        self._request = request

    def found(self, origin: Origin, form: Any) -> Answer | None:
        """The answer, where it is there already. The next request of this origin gets it by `repeated`."""
        return None

    async def complete(self) -> bytes:
        """As OpenAI's JSON."""
        return orjson.dumps(await self._generator.complete(self._request))

    async def stream(self) -> Delivery:
        """As it comes."""
        return await self._generator.generate(self._request)


class Work:
    """A request's place in the engine, and its measures. `leave` however it ended."""

    __slots__ = ("_left", "_models", "_slot", "measures")

    def __init__(self, slot: Slot, models: Models, measures: Inference) -> None:
        self._slot = slot
        self._models = models
        self._left = False
        self.measures = measures

    def succeeded(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        self.measures.outcome = "ok"
        self.used(prompt_tokens, completion_tokens)

    def failed(self, error: BaseException) -> None:
        """Of what is no `Exception`, a cancellation, it is nobody's fault."""
        if isinstance(error, Exception):
            refused = isinstance(error, ServeError) and error.status < 500
            self.measures.outcome = "refused" if refused else "error"

    def used(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        self.measures.prompt_tokens = prompt_tokens or 0
        self.measures.completion_tokens = completion_tokens or 0

    def leave(self) -> None:
        if not self._left:
            self._left = True
            self._slot.leave()
            self._models.leave()
        record = current_request.get()
        if record is not None and record.overdue and self.measures.outcome == "aborted":
            self.measures.outcome = "timeout"
        self.measures.end()


class RelayedEvents:
    """Server-sent events of another API. Close it however the iteration ended."""

    def __init__(self, events: AsyncGenerator[bytes, None], work: Work, record: RequestRecord) -> None:
        self._events = events
        self._work = work
        self._record = record

    async def __aiter__(self) -> AsyncIterator[bytes]:
        record = self._record
        try:
            async for event in self._events:
                note_event(event, record)
                yield event
            self._work.measures.outcome = "ok"
        except Exception as error:
            self._work.failed(error)
            raise

    async def aclose(self) -> None:
        try:
            await self._events.aclose()
        finally:
            if self._record.prompt_tokens is None and self._work.measures.outcome == "aborted":
                abandon()
            self._work.used(self._record.prompt_tokens, self._record.completion_tokens)
            self._work.leave()


class RecordedStream:
    """A `TokenStream` that writes its times and counts into the request's record."""

    def __init__(self, stream: TokenStream, started: float, work: Work) -> None:
        self.tokens = stream
        self._record = current_request.get() or RequestRecord(stream.id)
        self._started = started
        self._work = work

    def note_first_token(self) -> None:
        self._work.measures.first_token = now = time.perf_counter()
        self._record.time_to_first_token = now - self._started

    async def feed(self, sink: Sink) -> None:
        """Whoever calls it notes the first token."""
        try:
            await self.tokens.feed(sink)
            self._work.measures.outcome = "ok"
        except Exception as error:
            self._work.failed(error)
            raise

    async def aclose(self) -> None:
        """Stop the generation if it still runs. Call it however the rest ended."""
        record = self._record
        try:
            await self.tokens.aclose()
        finally:
            usage = self.tokens.usage
            # Without a token the engine has not said yet what it read.
            record.prompt_tokens, record.completion_tokens = (
                usage.prompt_tokens or None,
                usage.completion_tokens,
            )
            if not usage.prompt_tokens and self._work.measures.outcome == "aborted":
                abandon()
            self._work.used(usage.prompt_tokens, usage.completion_tokens)
            self._work.leave()

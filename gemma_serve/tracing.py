"""OpenTelemetry's traces: a span for each request, and below it one for each thing that it goes through.

Nothing here runs, and nothing of OpenTelemetry is imported, unless there is a receiver. With one, spans are
made a few times a request, never by the token, and are sent by a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING

from .logs import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

_Value = str | int | float | None
_SEND_SECONDS, _FLUSH_SECONDS = 5.0, 5.0
_CONTEXT = (b"traceparent", b"tracestate")
"""The headers of W3C's trace context."""


class Tracing:
    """Sends spans to an OTLP receiver: `url` is where it takes traces over HTTP, `share` of them is sent.

    A request that says whether its trace is recorded, by its `traceparent`, is obeyed in that.
    """

    def __init__(self, url: str, share: float, service: str, version: str) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(share)),
            resource=Resource.create({"service.name": service, "service.version": version}),
            shutdown_on_exit=False,  # `aclose` does it, and does not wait for a receiver that hangs
        )
        exporter = OTLPSpanExporter(url, timeout=_SEND_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(self._provider)  # vLLM's spans of this process go there
        self._tracer = self._provider.get_tracer("gemma_serve", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, record: RequestRecord, headers: Iterable[tuple[bytes, bytes]] = ()) -> Trace:
        """The trace of a request that has just come, a part of its client's if `headers` say so; `end` it."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        theirs = {name.decode(): value.decode("latin-1") for name, value in headers if name in _CONTEXT}
        span = self._tracer.start_span("request", self._propagator.extract(theirs), SpanKind.SERVER)
        context = set_span_in_context(span)
        ours: dict[str, str] = {}
        self._propagator.inject(ours, context)
        record.trace_id = format(span.get_span_context().trace_id, "032x")
        return Trace(self._tracer, span, context, ours)

    async def aclose(self) -> None:
        """Send what is left, if that can be done soon."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=shut_down, name="traces-end", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_SECONDS):
                await done.wait()


class Trace:
    """Of one request."""

    __slots__ = ("_context", "_span", "_tracer", "headers")

    def __init__(self, tracer: Tracer, span: Span, context: Context, headers: dict[str, str]) -> None:
        self._tracer = tracer
        self._span = span
        self._context = context
        self.headers = headers
        """What makes a span elsewhere a part of this one: `traceparent`, and `tracestate`."""

    def phase(self, name: str, started: float) -> None:
        """See `phase`."""
        if self._span.is_recording():
            now = time.time_ns()
            begun = now - int((time.perf_counter() - started) * 1e9)
            self._tracer.start_span(name, self._context, start_time=begun).end(now)

    def end(self, name: str, record: RequestRecord, attributes: dict[str, _Value]) -> None:
        """As the record says how the request ended. `attributes` that are None are left out."""
        from opentelemetry.trace import StatusCode

        span = self._span
        if span.is_recording():
            span.update_name(name)
            found: dict[str, _Value] = attributes | {
                "http.response.status_code": record.final_status,
                "gen_ai.response.model": record.model,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.completion_tokens,
                "gemma.request_id": record.id,
                "gemma.key": record.key,
                "gemma.cache": record.cache,
                "gemma.time_to_first_token": record.time_to_first_token,
            }
            span.set_attributes({key: value for key, value in found.items() if value is not None})
            if record.final_status >= 500:
                span.set_status(StatusCode.ERROR)
        span.end()


current_trace: ContextVar[Trace | None] = ContextVar("current_trace", default=None)
"""Of the request being served; None where none is recorded."""


def phase(name: str, started: float) -> None:
    """The request being served went through this from `started` (`time.perf_counter()`) until now."""
    if (trace := current_trace.get()) is not None:
        trace.phase(name, started)

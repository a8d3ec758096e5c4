"""Traces, as a real receiver gets them: OTLP over HTTP, decoded by OpenTelemetry's own messages."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from gemma_serve.app import create_app
from gemma_serve.errors import ServeError

from .chat_client import chatting
from .conftest import ROOT, serving, start_server, until
from .fake_engine import FakeEngine
from .test_app import CHAT, settings

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Receiver:
    """What it got is in `spans`, with the name of the service that each is of."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self.requests = 0
        self.refuses = threading.Event()
        """Set it, and it answers 503."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                receiver.requests += 1
                if self.path == "/v1/traces" and not receiver.refuses.is_set():
                    gzipped = self.headers.get("content-encoding") == "gzip"
                    receiver._take(gzip.decompress(data) if gzipped else data)
                self.send_response(503 if receiver.refuses.is_set() else 200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _take(self, data: bytes) -> None:
        for part in ExportTraceServiceRequest.FromString(data).resource_spans:
            names = {one.key: one.value.string_value for one in part.resource.attributes}
            service = names["service.name"]
            self.spans += [(service, span) for scope in part.scope_spans for span in scope.spans]

    def of(self, trace: str) -> dict[str, Span]:
        """The spans of one trace, by name."""
        return {span.name: span for _, span in self.spans if span.trace_id.hex() == trace}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running_receiver() as receiver:
        yield receiver


@contextmanager
def running_receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        receiver.server.server_close()
        thread.join()


def attributes(span: Span) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "") for one in span.attributes}


def parent(trace: str = TRACE, sampled: bool = True) -> dict[str, str]:
    return {"traceparent": f"00-{trace}-{PARENT}-0{int(sampled)}"}


@pytest.mark.slow
def test_what_a_request_goes_through(receiver: Receiver, tmp_path: Path) -> None:
    given = {"otel.endpoint": receiver.url, "cache.enabled": "true", "engine.enforce_eager": "true"}
    server = start_server("--config", "demo", *(f"--set={name}={value}" for name, value in given.items()))
    try:
        server.wait_ready()
        with httpx.Client(base_url=server.url, timeout=120) as client:
            messages = [{"role": "user", "content": "a secret word"}]
            body = {"messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            whole, hit, streamed = ("a" * 32, "b" * 32, "c" * 32)
            for trace, more in ((whole, {}), (hit, {}), (streamed, {"stream": True, "seed": 1})):
                answer = client.post("/v1/chat/completions", json=body | more, headers=parent(trace))
                assert answer.status_code == 200, answer.text
            assert (
                client.post("/v1/responses", json={"input": "Hi"}, headers=parent("d" * 32)).status_code
                == 200
            )
    finally:
        assert server.end() == 0, server.text[-3000:]  # which sends what it has not sent yet

    for trace in (whole, streamed, "d" * 32):
        spans = receiver.of(trace)
        phases = ["queue", "schedule", "prefill", "decode"]
        cached = [] if trace == "d" * 32 else ["cache"]
        path = "/v1/responses" if trace == "d" * 32 else "/v1/chat/completions"
        assert spans.keys() == {f"POST {path}", "llm_request", *cached, *phases}, trace
        request = spans[f"POST {path}"]
        assert request.parent_span_id.hex() == PARENT and request.kind == Span.SPAN_KIND_SERVER
        for name in (*cached, *phases, "llm_request"):
            assert spans[name].parent_span_id == request.span_id, name
            assert request.start_time_unix_nano <= spans[name].start_time_unix_nano, name
            assert spans[name].start_time_unix_nano <= spans[name].end_time_unix_nano, name
        for earlier, later in itertools.pairwise(phases[1:]):
            assert spans[earlier].end_time_unix_nano == spans[later].start_time_unix_nano

    request = receiver.of(whole)["POST /v1/chat/completions"]
    found = attributes(request)
    assert found["http.response.status_code"] == 200 and found["http.route"] == "/v1/chat/completions"
    assert found["gen_ai.response.model"] == "gemma-demo" and found["gen_ai.usage.output_tokens"] == 8
    assert found["gemma.cache"] == "miss" and found["gemma.request_id"]
    assert "secret" not in str(receiver.spans)
    assert attributes(receiver.of(streamed)["POST /v1/chat/completions"])["gemma.time_to_first_token"] > 0
    assert receiver.of(hit).keys() == {"POST /v1/chat/completions", "cache"}  # the engine had no part in it

    loading = {span.name for service, span in receiver.spans if service == "gemma-serve"}
    assert {"Load model", "Worker init"} <= loading  # vLLM's processes send theirs


async def test_whose_traces_are_sent(receiver: Receiver) -> None:
    given = settings(otel={"endpoint": receiver.url, "sample_ratio": 0, "service_name": "mine"})
    async with (
        serving(create_app(given, FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        for headers in ({}, parent("e" * 32, sampled=False), parent(), {"traceparent": "00-nonsense"}):
            answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == 200
        for path in ("/health", "/health/ready", "/metrics", "/ping"):
            assert (await client.get(path, headers=parent())).status_code == 200
    assert [(service, span.name) for service, span in receiver.spans] == [
        ("mine", "queue"),
        ("mine", "POST /v1/chat/completions"),
    ]
    assert receiver.of(TRACE).keys() == {"queue", "POST /v1/chat/completions"}


async def test_how_requests_end(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(fail_at=0, error=ServeError("the fake engine failed"))
    app = create_app(settings(otel={"endpoint": receiver.url}), engine)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=parent())).status_code == 500
        wrong = await client.post("/v1/chat/completions", json={}, headers=parent("f" * 32))
        assert wrong.status_code == 400
        nowhere = await client.get("/nowhere/secret", headers=parent("1" * 32))
        assert nowhere.status_code == 404
        engine.fail_at = None
        async with chatting(url) as chat:
            assert (await chat.ask("chat", message="Hi"))["type"] == "message"
        engine.hang_at = 0
        left = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers=parent("2" * 32)))
        await until(lambda: engine.hanging == 1)
        left.cancel()
        await until(lambda: engine.cancelled == 1)
    failed = receiver.of(TRACE)["POST /v1/chat/completions"]
    assert failed.status.code == Status.STATUS_CODE_ERROR
    refused = receiver.of("f" * 32)["POST /v1/chat/completions"]
    assert refused.status.code == Status.STATUS_CODE_UNSET
    assert attributes(refused)["http.response.status_code"] == 400
    assert receiver.of("1" * 32).keys() == {"GET"}
    assert attributes(receiver.of("2" * 32)["POST /v1/chat/completions"])["http.response.status_code"] == 499
    (message,) = (span for _, span in receiver.spans if span.name == "/ws chat")
    assert receiver.of(message.trace_id.hex()).keys() == {"/ws chat", "queue"}
    assert attributes(message)["gen_ai.usage.output_tokens"] == 2


async def test_a_receiver_that_refuses_or_is_away_disturbs_nobody(receiver: Receiver) -> None:
    receiver.refuses.set()
    for endpoint in (receiver.url, "http://127.0.0.1:9"):
        app = create_app(settings(otel={"endpoint": f"{endpoint}/v1/traces"}), FakeEngine())
        async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
            for _ in range(20):
                assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert receiver.requests and not receiver.spans


def test_off_it_is_not_even_imported() -> None:
    code = (
        "import sys; from gemma_serve.app import create_app; from gemma_serve.settings import Settings; "
        "create_app(Settings()); sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)

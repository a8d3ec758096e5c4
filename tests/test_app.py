"""The application around a fake engine: what is the server's own and not the engine's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from openapi_spec_validator import validate

from gemma_serve import __version__
from gemma_serve.api_keys import ApiKeys
from gemma_serve.app import create_app, middleware
from gemma_serve.blocks import Blocks
from gemma_serve.drain import Drain
from gemma_serve.engine.base import EngineState, RelayKind
from gemma_serve.engine.installed import vllm_version
from gemma_serve.errors import ContextLengthExceeded
from gemma_serve.metrics import Metrics
from gemma_serve.rate_limit import RateLimiter
from gemma_serve.settings import Settings

from .conftest import serving, until
from .fake_engine import FakeEngine

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def settings(**sections: object) -> Settings:
    return Settings(model={"name": "gemma-demo"}, **sections)  # type: ignore[arg-type]


def test_middleware_order() -> None:
    given, security = settings(), settings().security
    items = middleware(given, Metrics(), Drain(), ApiKeys(security), Blocks(security), RateLimiter(given))
    assert [item.cls.__name__ for item in items] == [  # type: ignore[attr-defined]
        "ProxyHeadersMiddleware",
        "RequestLog",
        "RequestMetrics",
        "UnexpectedError",
        "SecurityHeaders",
        "DrainRequests",
        "CORS",
        "TrustedHost",
        "Authentication",
        "RateLimit",
        "BodyLimit",
    ]


async def test_while_loading_the_port_is_open_and_generation_waits() -> None:
    engine = FakeEngine(ready=False)
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        engine.status.set(EngineState.LOADING, "loading weights")
        assert (await client.get("/health/live")).status_code == 200
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading", "phase": "loading weights"})
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        error = answer.json()["error"]
        assert error["code"] == "engine_loading"
        assert "loading weights" in error["message"]
        assert (await client.get("/v1/models")).json()["data"][0]["state"] == "loading"
        engine.status.set(EngineState.READY)
        assert (await client.get("/health/ready")).status_code == 200
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_a_failed_engine_is_not_live() -> None:
    engine = FakeEngine(ready=False)
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        engine.status.set(EngineState.FAILED, error="no such model")
        for path in ("/health", "/health/live", "/health/ready"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["reason"]) == (503, "no such model")


async def test_an_error_before_the_stream_has_its_status() -> None:
    error = ContextLengthExceeded("too long", param="messages")
    engine = FakeEngine(fail_at=0, error=error)
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        for stream in (False, True):
            answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
            assert answer.status_code == 400
            assert answer.json() == {
                "error": {
                    "message": "too long",
                    "type": "invalid_request_error",
                    "param": "messages",
                    "code": "context_length_exceeded",
                }
            }
    assert all(stream.closed for stream in engine.streams)


async def test_an_error_within_the_stream_is_its_last_event() -> None:
    engine = FakeEngine(fail_at=1)
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert answer.status_code == 200
    events = answer.text.strip().split("\n\n")
    assert '"content":"Hello"' in events[-2]
    assert events[-1].startswith('data: {"error":{"message":"the fake engine failed","type":"server_error"')


async def test_an_unexpected_error_is_a_500_in_openai_shape() -> None:
    engine = FakeEngine(fail_at=0, error=ZeroDivisionError("secret detail"))
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        for stream in (False, True):
            answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
            assert answer.status_code == 500
            assert answer.json()["error"]["type"] == "server_error"
            assert "secret" not in answer.text
            assert answer.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hang_at", [0, 1])
async def test_a_request_that_outlives_the_shutdown_is_told(stream: bool, hang_at: int) -> None:
    engine = FakeEngine(hang_at=hang_at)
    async with serving(create_app(settings(), engine), grace=1) as url:
        client = httpx.AsyncClient(base_url=url, timeout=30)
        request = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": stream}))
        await until(lambda: engine.hanging == 1)
    answer = await request
    await client.aclose()
    if stream and hang_at:
        assert answer.status_code == 200
        error = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 503
        error = answer.json()["error"]
    assert error["code"] == "server_shutting_down"
    assert engine.cancelled == 1


async def test_head_for_probes() -> None:
    async with (
        serving(create_app(settings(), FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        for path in ("/health", "/health/live", "/health/ready"):
            assert (await client.head(path)).status_code == 200


async def test_ping_says_what_ready_says() -> None:
    engine = FakeEngine(ready=False)
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        for state in EngineState:
            engine.status.set(state)
            ready = await client.get("/health/ready")
            for method in ("GET", "POST"):
                answer = await client.request(method, "/ping")
                assert (answer.status_code, answer.content) == (ready.status_code, b""), state
                assert answer.headers.get("retry-after") == ready.headers.get("retry-after")


async def test_version_needs_no_engine() -> None:
    app = create_app(settings(), FakeEngine(ready=False))
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        answer = await client.get("/version")
    assert answer.json() == {"version": vllm_version(), "gemma_serve": __version__}


async def test_cors_only_for_configured_origins() -> None:
    app = create_app(settings(security={"allowed_origins": ["https://a.example"]}), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        preflight = {"access-control-request-method": "POST", "origin": "https://a.example"}
        answer = await client.options("/v1/chat/completions", headers=preflight)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        refused = await client.options("/v1/models", headers=preflight | {"origin": "https://evil.example"})
        assert refused.status_code == 400
        assert "Disallowed CORS origin" in refused.json()["error"]["message"]
        answer = await client.get("/v1/models", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers


async def test_the_openapi_document_is_valid_and_complete() -> None:
    async with (
        serving(create_app(settings(), FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        document = (await client.get("/openapi.json")).json()
        validate(document)
        body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
        schema = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
        assert schema == "ChatCompletionBody"
        assert document["components"]["schemas"][schema]["required"] == ["messages"]
        assert document["components"]["schemas"][schema]["examples"]


async def test_the_docs_page_needs_no_other_host() -> None:
    async with (
        serving(create_app(settings(), FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        page = (await client.get("/docs")).text
        assert "http://" not in page
        assert "https://" not in page
        for asset in ("/docs/assets/swagger-ui-bundle.js", "/docs/assets/swagger-ui.css"):
            assert asset in page
            assert (await client.get(asset)).status_code == 200


async def test_a_bug_is_told_in_the_clients_shape() -> None:
    class Buggy(FakeEngine):
        async def relay(self, kind: RelayKind, body: dict[str, Any]) -> Any:
            raise RuntimeError("a bug")

    async with (
        serving(create_app(settings(), Buggy())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        openai = await client.post("/v1/responses", json={"input": "x"})
        anthropic = await client.post("/v1/messages", json={"messages": []})
    assert openai.status_code == anthropic.status_code == 500
    assert openai.json()["error"].keys() == {"message", "type", "param", "code"}
    assert anthropic.json()["type"] == "error"

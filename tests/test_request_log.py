from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator

import httpx
import pytest
import websockets

from gemma_serve.app import create_app
from gemma_serve.logs import JsonFormatter, TextFormatter

from .conftest import serving, until
from .fake_engine import FakeEngine
from .test_app import CHAT, settings


@pytest.fixture(autouse=True)
def _no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO, "gemma_serve")
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "gemma_serve.request"]


async def test_the_line_and_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        serving(create_app(settings(), FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        await client.post(
            "/v1/chat/completions", json=CHAT | {"stream": True}, headers={"X-Request-Id": "abc-1"}
        )
    (record,) = lines(caplog)
    text = TextFormatter().format(record)
    assert re.search(r" - INFO - POST /v1/chat/completions - 127\.0\.0\.1 - 200 - \d+\.\d{3}s$", text), text
    entry = json.loads(JsonFormatter().format(record))
    assert entry["model"] == "gemma-demo"
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (3, 2)
    assert 0 < entry["time_to_first_token"] < entry["seconds"]
    assert "Hi" not in text + json.dumps(entry)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_logged_as_499_and_its_work_cancelled(
    caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    engine = FakeEngine(hang_at=0)
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        request = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": stream}))
        await until(lambda: engine.hanging == 1)
        request.cancel()
        await until(lambda: engine.cancelled == 1)
        await until(lambda: len(lines(caplog)) == 1)
    assert " - 499 - " in lines(caplog)[0].getMessage()
    assert all(stream.closed for stream in engine.streams)


async def test_a_client_that_leaves_in_mid_stream(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(hang_at=1)
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        async with client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
            assert "assistant" in await anext(answer.aiter_text())
        await until(lambda: engine.cancelled == 1 and engine.streams[0].closed)
        await until(lambda: len(lines(caplog)) == 1)
    assert " - 499 - " in lines(caplog)[0].getMessage()


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1", True), ("a b", False), ("x" * 200, False), ("é", False), ("", False)]
)
async def test_request_id(given: str, kept: bool) -> None:
    async with (
        serving(create_app(settings(), FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        answer = await client.get("/health", headers={b"X-Request-Id": given.encode()})
    returned = answer.headers["x-request-id"]
    assert (returned == given) is kept
    assert re.fullmatch(r"[A-Za-z0-9-]{5,}", returned)


async def test_a_path_cannot_forge_a_line(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        serving(create_app(settings(), FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        await client.get("/x%0a2026-01-01%20-%20INFO%20-%20forged%1b[31m")
    message = lines(caplog)[0].getMessage()
    assert message.startswith("GET /x%0a2026-01-01%20-%20INFO%20-%20forged%1b[31m - 127.0.0.1 - 404 - ")


async def test_a_refused_websocket(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(create_app(settings(), FakeEngine())) as url:
        with pytest.raises(websockets.exceptions.InvalidStatus):
            await websockets.connect(url.replace("http", "ws") + "/nowhere")
    assert " - 403 - " in lines(caplog)[0].getMessage()


def test_a_message_of_several_lines_cannot_forge_one() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "a\nPOST /v1 - 192.0.2.1 - 200 - 1.000s", None, None)
    first, second = TextFormatter().format(record).splitlines()
    assert first.endswith(" - INFO - a")
    assert " - INFO - | POST /v1" in second


def test_what_json_cannot_hold_is_logged_all_the_same() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "\ud800 %d", (2**70,), None)
    assert json.loads(JsonFormatter().format(record))["level"] == "INFO"


async def test_probes_are_not_logged_at_info(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        serving(create_app(settings(), FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        await client.get("/health/ready")
    assert not lines(caplog)

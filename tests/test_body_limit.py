from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from gemma_serve.app import create_app
from gemma_serve.protocols import http

from .conftest import serving
from .fake_engine import FakeEngine
from .test_app import settings

LIMIT = 10_000
HEADERS = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "sent",
    [
        b"Content-Length: 10001\r\n\r\n",  # nothing of the body
        b"Transfer-Encoding: chunked\r\n\r\n2711\r\n" + b"x" * 10_001 + b"\r\n",  # and more to come
        b"Content-Length: 10001\r\n\r\n" + b"x" * 10_001,
    ],
)
async def test_a_longer_body_is_refused_before_the_rest_is_read(sent: bytes) -> None:
    app = create_app(settings(server={"max_body_bytes": LIMIT}), FakeEngine())
    async with serving(app) as url:
        parsed = httpx.URL(url)
        reader, writer = await asyncio.open_connection(parsed.host, parsed.port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + sent
        )
        async with asyncio.timeout(10):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert error["code"] == "request_too_large"
    assert "10,000 bytes" in error["message"]


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("seconds", [60, 0.1])
async def test_what_is_still_sent_does_not_reset_the_connection(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a proxy that sends the rest, and reads later, would answer 502."""
    monkeypatch.setattr(http, "_LINGER_SECONDS", seconds)
    app = create_app(settings(server={"max_body_bytes": LIMIT}), FakeEngine())
    async with serving(app) as url:
        parsed = httpx.URL(url)
        reader, writer = await asyncio.open_connection(parsed.host, parsed.port)
        writer.write(HEAD + b"Content-Length: 1000000000\r\n\r\n" + b"x" * 2 * LIMIT)
        async with asyncio.timeout(10):
            assert (await reader.read()).startswith(b"HTTP/1.1 413 ")
        if seconds == 60:
            for _ in range(50):
                writer.write(b"x" * 100_000)
                await writer.drain()
        else:
            with pytest.raises(ConnectionError):  # who does not stop is left in the end
                async with asyncio.timeout(10):
                    while True:
                        writer.write(b"x" * 1000)
                        await writer.drain()
                        await asyncio.sleep(0.01)
        writer.close()


async def test_a_body_of_exactly_the_limit_passes() -> None:
    body = b'{"messages": [{"role": "user", "content": "Hi"}]}'
    app = create_app(settings(server={"max_body_bytes": LIMIT}), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        answer = await client.post("/v1/chat/completions", content=body.ljust(LIMIT), headers=HEADERS)
    assert answer.status_code == 200

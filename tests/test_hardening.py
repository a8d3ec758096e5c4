"""What a hostile client may send, and how: it is told plainly, costs little, and holds nobody else up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from pydantic import ValidationError

from gemma_serve.app import create_app
from gemma_serve.settings import LimitsSettings, ServerSettings, Settings, SettingsError

from .conftest import serving, start, until
from .fake_engine import FakeEngine
from .test_app import CHAT, settings
from .test_rate_limit import find_limiter

JSON = b"Content-Type: application/json\r\n"


async def exchange(url: str, *pieces: bytes, pause: float = 0) -> tuple[int, dict[str, Any], bytes]:
    """Send bytes as they are; the status, body and head of the answer, once the server closes."""
    parsed = httpx.URL(url)
    reader, writer = await asyncio.open_connection(parsed.host, parsed.port)
    received = b""

    async def read() -> None:
        nonlocal received
        with contextlib.suppress(ConnectionResetError):  # by a piece that came after the server had closed
            while piece := await reader.read(65_536):
                received += piece

    reading = asyncio.create_task(read())
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(pause)
        async with asyncio.timeout(20):
            await reading
    finally:
        writer.close()
    head, _, body = received.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), (json.loads(body) if body else {}), head


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a browser that takes it for HTTPS
        b"HELLO\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nBad Header\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_answered_plainly(sent: bytes) -> None:
    async with serving(create_app(settings(), FakeEngine())) as url:
        status, body, head = await exchange(url, sent)
        assert status == 400, head
        assert body["error"]["type"] == "invalid_request_error"
        assert b"connection: close" in head.lower()


async def test_admin_without_keys_is_not_for_a_proxy_that_names_nobody() -> None:
    """As nginx asks by `proxy_pass http://127.0.0.1:8000` and nothing else."""
    async with serving(create_app(settings(), FakeEngine())) as url:
        for version, status in ((b"1.0", 403), (b"1.1", 404)):
            host = url.removeprefix("http://").encode()
            head = b"GET /admin/nothing HTTP/%b\r\nHost: %b\r\nConnection: close\r\n\r\n"
            assert (await exchange(url, head % (version, host)))[0] == status


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET /v1/models?" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
        [b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 40_000 + b"\r\n\r\n"],
        [b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: ", *[b"x" * 10_000] * 5],  # without an end
        [
            b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"
            + b"".join(b"X%d: y\r\n" % i for i in range(200))
            + b"\r\n"
        ],
        [
            b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nX: "
            + b"x" * 40_000
            + b"\r\n\r\n"
        ],
    ],
    ids=["url", "header", "endless", "many", "websocket"],
)
async def test_a_head_that_is_too_large(pieces: list[bytes]) -> None:
    async with serving(create_app(settings(), FakeEngine())) as url:
        status, body, _ = await exchange(url, *pieces, pause=0.01)
        assert (status, body["error"]["code"]) == (431, "request_head_too_large")


async def test_a_large_body_after_a_small_head_passes() -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 200_000}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + JSON
    async with serving(create_app(settings(), FakeEngine())) as url:
        status, _, _ = await exchange(url, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert status == 200


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n"],
        [b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + JSON + b"Content-Length: 50\r\n\r\n{", b'"'],
    ],
    ids=["head", "body"],
)
async def test_a_slow_sender_is_not_waited_for(pieces: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(settings(security={"max_in_flight": 10}), FakeEngine())
    async with serving(app, limits=ServerSettings(read_timeout_seconds=0.3)) as url:
        status, body, _ = await exchange(url, *pieces, pause=0.05)
        assert (status, body["error"]["code"]) == (408, "request_timeout")
        await until(lambda: find_limiter(app).in_flight() == 0)
    assert "Traceback" not in caplog.text


async def test_trailers_without_an_end_are_not_collected() -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + JSON
    async with serving(create_app(settings(), FakeEngine())) as url:
        pieces = [head + b"\r\n1\r\n{\r\n0\r\nX: ", *[b"x" * 10_000] * 5]
        status, body, _ = await exchange(url, *pieces, pause=0.01)
        assert (status, body["error"]["code"]) == (431, "request_head_too_large")


async def test_many_small_chunks_are_a_body() -> None:
    body = json.dumps(CHAT | {"user": "x" * 20_000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + JSON
    async with serving(create_app(settings(), FakeEngine())) as url:
        assert (await exchange(url, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks))[0] == 200


async def test_empty_lines_do_not_keep_a_connection_open() -> None:
    limits = ServerSettings(read_timeout_seconds=0.3, idle_timeout_seconds=0.3)
    async with serving(create_app(settings(), FakeEngine()), limits=limits) as url:
        parsed = httpx.URL(url)
        reader, writer = await asyncio.open_connection(parsed.host, parsed.port)
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"}")
        writer.write(b"\r\n")
        async with asyncio.timeout(10):
            await reader.read()
        writer.close()


async def test_the_next_request_may_begin_during_a_long_answer() -> None:
    engine = FakeEngine(("a",) * 10, pause=0.1)
    app = create_app(settings(), engine)
    body = json.dumps(CHAT | {"stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body) + JSON
    async with serving(app, limits=ServerSettings(read_timeout_seconds=0.3)) as url:
        parsed = httpx.URL(url)
        reader, writer = await asyncio.open_connection(parsed.host, parsed.port)
        writer.write(head + b"\r\n" + body)
        await reader.readuntil(b"data: ")
        writer.write(b"GET /health/live HTTP/1.1\r\n")
        async with asyncio.timeout(10):
            rest = await reader.read()
        writer.close()
        answer, _, refusal = rest.partition(b"data: [DONE]")
        assert answer.count(b'"content":"a"') == 10
        assert b"HTTP/1.1 408" in refusal


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with serving(
        create_app(settings(), FakeEngine()), limits=ServerSettings(read_timeout_seconds=0.2)
    ) as url:
        assert (await exchange(url))[0] == 0


async def test_a_connection_stays_open_between_requests_for_as_long_as_set() -> None:
    request = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    async with serving(
        create_app(settings(), FakeEngine()), limits=ServerSettings(idle_timeout_seconds=0.3)
    ) as url:
        parsed = httpx.URL(url)
        reader, writer = await asyncio.open_connection(parsed.host, parsed.port)
        for _ in range(2):
            asked = time.monotonic()
            writer.write(request)
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        async with asyncio.timeout(10):
            await reader.read()
        assert time.monotonic() - asked >= 0.25
        writer.close()


async def test_a_slow_answer_is_not_a_slow_sender() -> None:
    engine = FakeEngine(("a",) * 10, pause=0.1)
    async with (
        serving(create_app(settings(), engine), limits=ServerSettings(read_timeout_seconds=0.3)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert answer.text.rstrip().endswith("[DONE]")


async def test_a_reader_that_stops_ends_its_generation_and_frees_its_slot() -> None:
    engine = FakeEngine(("x" * 50_000,) * 10_000, pause=0.0)
    app = create_app(settings(security={"max_in_flight": 10}), engine)
    async with serving(app, limits=ServerSettings(write_timeout_seconds=0.3)) as url:
        parsed = httpx.URL(url)
        _, writer = await asyncio.open_connection(parsed.host, parsed.port, limit=1024)
        body = json.dumps(CHAT | {"stream": True}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + JSON
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: find_limiter(app).in_flight() == 1)
        await until(lambda: find_limiter(app).in_flight() == 0, 30)
        assert engine.streams[0].closed
        assert engine.streams[0].usage.completion_tokens < 10_000
        writer.close()


POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + JSON


@pytest.mark.usefixtures("no_errors")
async def test_a_wrong_body_that_waits_to_be_asked_for_is_refused_quietly() -> None:
    head = POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serving(create_app(settings(), FakeEngine())) as url:
        status, body, _ = await exchange(url, head + b"zz\r\n")
        assert (status, body["error"]["code"]) == (400, "invalid_http")


@pytest.mark.usefixtures("no_errors")
@pytest.mark.parametrize("stream", [False, True])
async def test_a_wrong_request_behind_another_breaks_neither_its_answer_nor_the_log(stream: bool) -> None:
    engine = FakeEngine(hang_at=1)
    body = json.dumps(CHAT | {"stream": stream}).encode()
    async with serving(create_app(settings(), engine)) as url:
        first = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
        second = POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
        parsed = httpx.URL(url)
        reader, writer = await asyncio.open_connection(parsed.host, parsed.port)
        writer.write(first + second)
        async with asyncio.timeout(20):
            answer = await reader.read()
        assert b"400" not in answer, answer
        await until(lambda: engine.cancelled == len(engine.requests))
        writer.close()


@pytest.mark.usefixtures("no_errors")
async def test_nothing_begins_behind_a_last_answer() -> None:
    engine = FakeEngine()
    body = json.dumps(CHAT).encode()
    async with serving(create_app(settings(), engine)) as url:
        first = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        second = POST + b"Content-Length: %d\r\n\r\n{" % len(body)
        parsed = httpx.URL(url)
        reader, writer = await asyncio.open_connection(parsed.host, parsed.port)
        writer.write(first + second)
        async with asyncio.timeout(20):
            assert (await reader.read()).count(b"HTTP/1.1 ") == 1
        writer.write(body[1:])
        writer.close()
    assert len(engine.requests) == 1


async def test_a_refused_client_that_stays_does_not_hold_up_the_end() -> None:
    async with serving(create_app(settings(), FakeEngine()), grace=60) as url:
        parsed = httpx.URL(url)
        reader, writer = await asyncio.open_connection(parsed.host, parsed.port)
        writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        async with asyncio.timeout(20):
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        ended = time.monotonic()
    assert time.monotonic() - ended < 4, "it waited until the connection was given up"
    writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_who_leaves_with_a_second_request_waiting_ends_the_first(stream: bool) -> None:
    engine = FakeEngine(hang_at=1)
    async with serving(create_app(settings(), engine)) as url:
        parsed = httpx.URL(url)
        _, writer = await asyncio.open_connection(parsed.host, parsed.port)
        body = json.dumps(CHAT | {"stream": stream}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + JSON
        writer.write((head + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 2)
        await until(lambda: engine.hanging == 1)
        writer.transport.abort()
        await until(lambda: engine.cancelled == 1)
        assert len(engine.requests) == 1


async def test_a_large_answer_may_take_long_to_read() -> None:
    size, body = 40_000_000, json.dumps(CHAT).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body) + JSON
    app = create_app(settings(), FakeEngine(("x" * size,)))
    async with serving(app, limits=ServerSettings(write_timeout_seconds=2)) as url:
        parsed = httpx.URL(url)
        reader, writer = await asyncio.open_connection(parsed.host, parsed.port)
        writer.write(head + b"Connection: close\r\n\r\n" + body)
        received = 0
        while piece := await reader.read(65_536):
            received += len(piece)
            await asyncio.sleep(0.006)  # a slow line
        writer.close()
        assert received > size


async def test_too_many_connections_are_told_and_probes_answered() -> None:
    app = create_app(settings(), FakeEngine())
    async with serving(app, limits=ServerSettings(max_connections=5)) as url:
        parsed = httpx.URL(url)
        idle = [await asyncio.open_connection(parsed.host, parsed.port) for _ in range(5)]
        status, body, head = await exchange(url, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (status, body["error"]["code"]) == (503, "too_many_connections")
        assert b"retry-after" in head.lower()
        probe = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert (await exchange(url, probe))[0] == 200
        for _, writer in idle:
            writer.close()
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:

            async def again() -> bool:
                return (await client.get("/v1/models")).status_code == 200

            async with asyncio.timeout(10):
                while not await again():
                    await asyncio.sleep(0.01)


async def test_a_refused_handshake_is_no_error_of_the_servers(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(settings(security={"api_keys": ["sk-0123456789abcdef"]}), FakeEngine())
    async with serving(app) as url:
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(url.replace("http", "ws") + "/ws")
    assert refused.value.response.status_code == 401
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_deep_json_and_costly_requests_are_refused() -> None:
    limits = {"max_tokens": 100, "max_tools": 2, "max_schema_bytes": 500, "max_images": 1, "max_n": 4}
    engine = FakeEngine()
    schema = {"type": "json_schema", "json_schema": {"name": "x" * 600, "schema": {}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    shown = {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image", "source": {}}] * 2}
    result = {"role": "user", "content": [shown]}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/chat/completions", CHAT | {"max_tokens": 101}, "max_tokens"),
        ("/v1/chat/completions", CHAT | {"max_completion_tokens": 101}, "max_completion_tokens"),
        ("/v1/chat/completions", CHAT | {"n": 5}, "n"),
        ("/v1/chat/completions", CHAT | {"stop": list("abcde")}, "stop"),
        ("/v1/chat/completions", CHAT | {"bad_words": ["a"] * 300}, "bad_words"),
        ("/v1/chat/completions", CHAT | {"tools": [tool] * 3}, "tools"),
        ("/v1/chat/completions", CHAT | {"response_format": schema}, "response_format"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ("/v1/chat/completions", CHAT | {"prompt_logprobs": 21}, "prompt_logprobs"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image] * 2}]}, "messages"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 101}, "max_tokens"),
        ("/v1/responses", {"input": "x", "max_output_tokens": 101}, "max_output_tokens"),
        ("/v1/messages", {"messages": [], "max_tokens": 101}, "max_tokens"),
        ("/v1/responses", {"input": "x", "max_output_tokens": "101"}, "max_output_tokens"),
        ("/v1/messages", {"messages": [], "max_tokens": 101.0}, "max_tokens"),
        ("/v1/messages", {"messages": [result], "max_tokens": 9}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"image_url": "x"}] * 2}]}, "messages"),
        ("/v1/responses", {"input": "x", "model": ["gemma-demo"]}, "model"),
        ("/v1/responses", {"input": "x", "metadata": dict.fromkeys(map(str, range(2000)))}, "metadata"),
    ]
    app = create_app(settings(limits=limits), engine)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for path, body, param in cases:
            answer = await client.post(path, json=body)
            assert answer.status_code == 400, (param, answer.text)
            assert f"'{param}'" in answer.text or "images" in answer.text
        for depth, status in ((60, 200), (70, 400), (900, 400)):
            nested = '{"a":' * (depth - 2) + "1" + "}" * (depth - 2)
            raw = f'{{"messages":[{{"role":"user","content":"x"}}],"chat_template_kwargs":{nested}}}'
            answer = await client.post(
                "/v1/chat/completions", content=raw, headers={"content-type": "application/json"}
            )
            assert answer.status_code == status, answer.text
        await client.post("/v1/chat/completions", json=CHAT)
        assert engine.requests[-1].body["max_tokens"] == 100
        for body in ({"input": "x"}, {"input": "x", "max_tokens": 9}):
            relayed = (await client.post("/v1/responses", json=body)).json()["body"]
            assert relayed["max_output_tokens"] == 100


async def test_security_headers() -> None:
    app = create_app(settings(), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for path in ("/v1/models", "/docs", "/nowhere"):
            headers = (await client.get(path)).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["x-frame-options"] == "DENY"
        policy = (await client.get("/docs")).headers["content-security-policy"]
        assert "'sha256-" in policy and "script-src 'self'" in policy
        assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]


async def test_trusted_hosts() -> None:
    app = create_app(settings(security={"trusted_hosts": ["api.example", "*.apps.example"]}), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for host, status in (
            ("api.example", 200),
            ("API.example:8000", 200),
            ("x.apps.example", 200),
            ("apps.example", 400),
            ("evilapi.example", 400),
            ("127.0.0.1", 400),
            ("[::1]:80", 400),
        ):
            assert (await client.get("/v1/models", headers={"Host": host})).status_code == status, host
            assert (await client.get("/health/live", headers={"Host": host})).status_code == 200
        twice = b"GET /v1/models HTTP/1.1\r\nHost: api.example\r\nHost: evil\r\nConnection: close\r\n\r\n"
        assert (await exchange(url, twice))[0] == 400


async def test_cors_is_configurable() -> None:
    security = {
        "allowed_origins": ["https://a.example"],
        "allowed_methods": ["GET"],
        "allowed_headers": ["X-API-Key"],
        "allow_credentials": True,
        "api_keys": ["sk-cors-0123456789abcdef"],
    }
    app = create_app(settings(security=security), FakeEngine())
    preflight = {"origin": "https://a.example", "access-control-request-method": "GET"}
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        answer = await client.options("/v1/models", headers=preflight)  # without a key: browsers send none
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-credentials"] == "true"
        for wrong in (
            {"access-control-request-method": "POST"},
            {"access-control-request-headers": "x-other"},
        ):
            assert (await client.options("/v1/models", headers=preflight | wrong)).status_code == 400
        answer = await client.get("/v1/models", headers={"origin": "https://a.example"})
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-ratelimit-remaining-requests" in answer.headers["access-control-expose-headers"].lower()


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        (
            {"GEMMA_SECURITY_ALLOWED_ORIGINS": "*", "GEMMA_SECURITY_ALLOW_CREDENTIALS": "true"},
            "any page could act",
        ),
        ({"GEMMA_SERVER_TLS_CERTIFICATE": __file__}, "must be set together"),
        ({"GEMMA_STORAGE_URL": "http://user:hunter2@redis"}, "must start with redis://"),
    ],
)
def test_settings_that_would_open_holes(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        Settings.load(environ=environ, env_file=None)
    assert "hunter2" not in str(caught.value)


def test_a_bad_certificate_is_a_sentence(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("nothing")
    environ = {"GEMMA_SERVER_TLS_CERTIFICATE": str(wrong), "GEMMA_SERVER_TLS_PRIVATE_KEY": str(wrong)}
    server = start("-m", "gemma_serve", "serve", "--config", "demo", "--port", "0", environ=environ)
    assert server.wait() == 1
    assert "TLS certificate or key cannot be used" in server.text
    assert "Traceback" not in server.text


def test_https(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    environ = {"GEMMA_SERVER_TLS_CERTIFICATE": str(certificate), "GEMMA_SERVER_TLS_PRIVATE_KEY": str(key)}
    server = start("-m", "gemma_serve", "serve", "--config", "demo", "--port", "0", environ=environ)
    try:
        url = server.wait_for(r"Listening on (https://[\w.:]+)")[1]
        context = ssl.create_default_context(cafile=certificate)
        with httpx.Client(
            verify=context, timeout=60, transport=httpx.HTTPTransport(verify=context, retries=10)
        ) as client:
            assert client.get(f"{url}/health/live").status_code == 200
    finally:
        assert server.end() == 0


@pytest.mark.parametrize("cached", [False, True])
async def test_a_body_as_deep_as_any_may_be(cached: bool) -> None:
    deepest = 200
    given = settings(
        limits={"max_json_depth": deepest}, cache={"enabled": cached}, security={"tokens_per_minute": 100_000}
    )
    async with (
        serving(create_app(given, FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        for depth, status in ((deepest, 200), (deepest + 1, 400)):
            schema: dict[str, Any] = {}
            for _ in range(depth - 4):  # below the body, the format and what it names
                schema = {"not": schema}
            wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            for stream in (False, True):
                body = CHAT | {"response_format": wanted, "temperature": 0, "stream": stream}
                answer = await http.post("/v1/chat/completions", json=body)
                assert answer.status_code == status, answer.text
    with pytest.raises(ValidationError, match="less than or equal to 200"):
        LimitsSettings(max_json_depth=deepest + 1)

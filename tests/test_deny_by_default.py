"""Without a key nothing but the public list answers 2xx, whatever the path, the headers and the method."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from urllib.parse import unquote

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gemma_serve.app import create_app
from gemma_serve.protocols import protocols
from gemma_serve.settings import SecuritySettings, ServerSettings

from . import test_app
from .fake_engine import FakeEngine

KEY = "sk-fuzz-0123456789abcdef"
PUBLIC = set(SecuritySettings().public_paths)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server of which every path exists, so that only the key can be what refuses."""
    config = {"api_keys": [KEY], "block_after_failures": 0, "allowed_origins": ["https://a.example"]}
    app = create_app(test_app.settings(security=config), FakeEngine())
    with_everything(app)
    uvicorn_config = uvicorn.Config(
        app, port=0, log_config=None, proxy_headers=False, **protocols(ServerSettings())
    )
    server = uvicorn.Server(uvicorn_config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def with_everything(app: FastAPI) -> None:
    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]

    @app.api_route("/{path:path}", methods=methods, include_in_schema=False)
    async def anything(path: str) -> PlainTextResponse:
        return PlainTextResponse("inside")


async def ask(port: int, method: str, target: str, headers: list[tuple[str, str]]) -> int:
    """The status of one request, sent as it is; 0 where the server hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        writer.write("\r\n".join(lines).encode("latin-1", "replace"))
        async with asyncio.timeout(20):
            line = await reader.readline()
        return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def is_public(target: str) -> bool:
    """Decided anew, not by the code under test."""
    path = unquote(target.split("?")[0].split("#")[0])
    if path.startswith("http://"):
        path = "/" + path.split("/", 3)[3] if path.count("/") > 2 else "/"
    if path in PUBLIC:
        return True
    return path.startswith(("/assets/", "/docs/assets/")) and not {"..", ".", ""} & set(path[1:].split("/"))


def mangled(path: str) -> st.SearchStrategy[str]:
    """The path in other spellings."""

    def encode(spots: list[bool]) -> str:
        padded = (spots + [False] * len(path))[: len(path)]
        return "".join(f"%{ord(char):02x}" if spot else char for char, spot in zip(path, padded, strict=True))

    return st.one_of(
        st.just(path),
        st.lists(st.booleans(), max_size=len(path)).map(encode),
        st.sampled_from(
            [
                "/" + path,
                path + "/",
                path.upper(),
                path.replace("/", "//"),
                path.replace("/", "/./"),
                "/docs/assets/.." + path,
                "/docs/assets/../.." + path,
                "/docs/assets/%2e%2e/%2e%2e" + path,
                "/docs/assets//" + path,
                "/assets/.." + path,
                "/assets/%2e%2e" + path,
                "/docs" + path,
                "/health/live/.." + path,
                "/health/live%2f.." + path,
                "/health/live;" + path,
                "/health/live?" + path,
                "/health/live#" + path,
                "/health/live%00" + path,
                "/health/live%3f" + path,
                path + "?x=/health/live",
                path + "#/docs",
                path + "%00/health/live",
                path + ";/health/live",
                path.replace("/", "\\"),
                "http://localhost" + path,
                "http://localhost/health/live/.." + path,
            ]
        ),
    )


ROUTES = [
    "/v1/models",
    "/v1/chat/completions",
    "/v1/responses",
    "/admin/blocks",
    "/metrics",
    "/health",
    "/ws",
    "/x",
]
TARGETS = st.one_of(
    st.sampled_from([*ROUTES, *PUBLIC]).flatmap(mangled),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30).map(lambda text: "/" + text),
)
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40)
HEADERS = st.lists(
    st.one_of(
        st.tuples(
            st.just("Host"), st.sampled_from(["x", "localhost", "127.0.0.1", "/docs", "x/health/live?"])
        ),
        st.tuples(
            st.sampled_from(["Authorization", "X-API-Key", "Cookie", "Origin", "X-Forwarded-For"]), VALUES
        ),
        st.tuples(
            st.just("Authorization"),
            st.sampled_from(
                [
                    "Bearer",
                    "Bearer null",
                    "Bearer *",
                    f"Bearer {KEY[:-1]}",
                    f"Bearer {KEY}x",
                    f"Basic {KEY}",
                    KEY,
                ]
            ),
        ),
        st.sampled_from(
            [
                ("X-Original-URL", "/health/live"),
                ("X-Rewrite-URL", "/docs"),
                ("X-Forwarded-Prefix", "/docs"),
                ("X-Forwarded-For", "127.0.0.1"),
                ("X-HTTP-Method-Override", "GET"),
                ("X-Forwarded-Host", "localhost"),
            ]
        ),
    ),
    max_size=4,
)
METHODS = st.sampled_from(
    ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY", "get"]
)
FUZZ = settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@FUZZ
@given(method=METHODS, target=TARGETS, headers=HEADERS)
@example("GET", "/docs/assets/../../v1/models", [("Host", "x")])
@example("GET", "//v1/models", [("Host", "x")])
@example("POST", "/health/live", [("Host", "x")])
@example("GET", "/v1/models?", [("Host", "localhost/health/live?")])
def test_http(port: int, method: str, target: str, headers: list[tuple[str, str]]) -> None:
    headers = [*headers, ("Connection", "close"), ("Content-Length", "0")]
    status = asyncio.run(ask(port, method, target, headers))
    if 200 <= status < 300:
        assert method in ("GET", "HEAD")
        assert is_public(target)


@FUZZ
@given(target=TARGETS, headers=HEADERS, protocols=st.lists(VALUES, max_size=2))
@example("/ws", [], ["openai-insecure-api-key."])
@example("/ws", [], [f"openai-insecure-api-key.{KEY}x"])
@example("/health/live", [], [])
def test_websocket(port: int, target: str, headers: list[tuple[str, str]], protocols: list[str]) -> None:
    upgrade = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ]
    offered = [("Sec-WebSocket-Protocol", ",".join(protocols))] if protocols else []
    status = asyncio.run(ask(port, "GET", target, [("Host", "x"), *headers, *upgrade, *offered]))
    assert status != 101
    assert not 200 <= status < 300 or is_public(target)


def test_with_the_key_it_is_all_there(port: int) -> None:
    """Or the tests above would show nothing."""
    key = [("Host", "x"), ("Authorization", f"Bearer {KEY}"), ("Connection", "close")]
    for target in ("/v1/models", "/x", "//v1/models", "/docs/../v1/models"):
        assert asyncio.run(ask(port, "GET", target, key)) == 200, target
    upgrade = [("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"), ("Connection", "Upgrade")]
    websocket = [*key[:2], *upgrade, ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")]
    assert asyncio.run(ask(port, "GET", "/ws", websocket)) == 101


def test_only_a_preflight_of_an_allowed_origin_passes(port: int) -> None:
    for origin, status in (("https://a.example", 200), ("https://b.example", 400)):
        headers = [("Host", "x"), ("Origin", origin), ("Access-Control-Request-Method", "POST")]
        assert asyncio.run(ask(port, "OPTIONS", "/v1/chat/completions", headers)) == status
    headers = [("Host", "x"), ("Origin", "https://a.example")]
    assert asyncio.run(ask(port, "OPTIONS", "/v1/chat/completions", headers)) == 401


def test_the_public_list_is_what_it_should_be() -> None:
    assert json.dumps(sorted(PUBLIC)) == json.dumps(
        [
            "/",
            "/assets/*",
            "/docs",
            "/docs/assets/*",
            "/health",
            "/health/live",
            "/health/ready",
            "/openapi.json",
        ]
    )

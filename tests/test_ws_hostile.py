"""Clients of the WebSocket chat that are broken, or mean harm."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import httpx
import pytest
import websockets

from gemma_serve.protocols.websocket import WebSocketProtocol
from gemma_serve.settings import ServerSettings

from .chat_client import app_of, chatting, closed
from .conftest import serving, until
from .fake_engine import FakeEngine
from .test_rate_limit import find_limiter

pytestmark = pytest.mark.usefixtures("no_errors")

GONE: dict[str, Any] = {"close_timeout": 0.1}
"""Of a client that reads nothing, and so never reads that the connection is closed."""


WRONG: dict[str, tuple[str | bytes, str | None, str | None]] = {
    "binary": (b"\x00\x01", "binary_frame", None),
    "empty": ("", None, None),
    "no JSON": ("{", "invalid_json", None),
    "list": ("[]", None, None),
    "deep": ('{"type":' + "[" * 200 + "]" * 200 + "}", "invalid_json", None),
    "NUL": ('{"type": "chat", "data": {"message": "\\u0000"}}', None, "data.message"),
    "no type": ("{}", "missing_required_parameter", "type"),
    "type": ('{"type": 1}', "invalid_type", "type"),
    "unknown": ('{"type": "nope"}', "unknown_type", "type"),
    "id": ('{"type": "ping", "id": 7}', "invalid_type", "id"),
    "long id": ('{"type": "ping", "id": "' + "x" * 65 + '"}', "invalid_value", "id"),
    "more": ('{"type": "ping", "more": 1}', "unknown_parameter", "more"),
    "data": ('{"type": "chat", "data": []}', "invalid_type", "data"),
    "no message": ('{"type": "chat"}', "missing_required_parameter", "message"),
    "empty message": ('{"type": "chat", "data": {"message": ""}}', "invalid_value", "message"),
    "message": ('{"type": "chat", "data": {"message": ["x"]}}', "invalid_type", "message"),
    "parameter": ('{"type": "chat", "data": {"message": "x", "n": 2}}', "unknown_parameter", "n"),
    "keep": ('{"type": "chat", "data": {"message": "x", "keep": -1}}', "invalid_value", "keep"),
    "role": ('{"type": "load", "data": {"messages": [{"role": "x", "content": ""}]}}', "invalid_value", None),
    "surrogate": ('{"type": "chat", "data": {"message": "\\ud800"}}', "invalid_json", None),
    "a list for a model": (
        '{"type": "chat", "data": {"message": "x", "model": ["x"]}}',
        "invalid_type",
        "model",
    ),
    "too long": ('{"type": "ping", "id": "' + "x" * 3_000 + '"}', "request_too_large", None),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_message_is_an_error_and_the_connection_stays(name: str) -> None:
    sent, code, param = WRONG[name]
    async with serving(app_of(chat={"max_message_bytes": 2_000})) as url, chatting(url) as chat:
        await chat.socket.send(sent)
        error = await chat.recv()
        assert error["type"] == "error"
        assert error["data"]["code"] == code
        if param is not None:
            assert error["data"]["param"] == param
        assert error["data"]["status"] in (400, 413)
        assert len(error["data"]["message"]) < 1_000
        assert (await chat.ask("ping"))["type"] == "pong"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({"temperature": 3}, "invalid_value"),
        ({"temperature": "hot"}, "invalid_type"),
        ({"max_tokens": 0}, "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_value"),
        ({"model": "gpt-5"}, "model_not_found"),
    ],
)
async def test_parameters_are_checked_as_over_http(data: dict[str, Any], code: str) -> None:
    async with serving(app_of()) as url, chatting(url) as chat:
        error = (await chat.ask("chat", message="Hi", **data))["data"]
        assert error["code"] == code
        over_http = {"messages": [{"role": "user", "content": "Hi"}], **data}
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            same = await http.post("/v1/chat/completions", json=over_http)
        assert same.json()["error"] == {name: error[name] for name in ("message", "type", "param", "code")}
        assert same.status_code == error["status"]


@pytest.mark.parametrize("message", ["{", '{"type": "cancel"}', '{"type": "ping"}'])
async def test_abuse_ends_the_connection(message: str) -> None:
    async with serving(app_of()) as url, chatting(url) as chat:
        with pytest.raises(websockets.ConnectionClosed):
            for _ in range(150):
                await chat.socket.send(message)
                await chat.recv()
        _, code = await closed(chat)
        assert code == 1008


async def test_a_message_beyond_all_limits_closes() -> None:
    limits = ServerSettings(max_body_bytes=5_000)
    async with serving(app_of(), limits=limits) as url, chatting(url) as chat:
        await chat.socket.send("x" * 10_000)
        assert await closed(chat) == ([], 1009)


async def test_a_reader_that_stops_ends_its_answer() -> None:
    engine = FakeEngine(("x" * 50_000,) * 10_000)
    app = app_of(engine, security={"max_in_flight": 5})
    limits = ServerSettings(write_timeout_seconds=0.3)
    async with serving(app, limits=limits) as url, chatting(url, max_queue=1, **GONE) as chat:
        await chat.send("chat", message="Hi", stream=True)
        await until(lambda: len(engine.streams) == 1)
        await until(lambda: engine.streams[0].closed, 30)
        assert engine.streams[0].usage.completion_tokens < 1_000  # what sockets' buffers hold, and no more
        await until(lambda: find_limiter(app).in_flight() == 0)


async def test_a_client_that_answers_no_ping_is_left() -> None:
    limits = ServerSettings(ping_seconds=0.1, write_timeout_seconds=1)
    async with serving(app_of(), limits=limits) as url, chatting(url) as dead, chatting(url) as alive:
        dead.socket.transport.pause_reading()
        await until(lambda: len(connections()) == 1, 30)
        dead.socket.transport.resume_reading()
        assert await closed(dead) == ([], 1011)
        assert (await alive.ask("ping"))["type"] == "pong"


async def test_a_client_that_leaves_ends_its_answer_and_finds_what_there_was() -> None:
    engine = FakeEngine(hang_at=1)
    async with serving(app_of(engine)) as url:
        async with chatting(url) as chat:
            await chat.send("chat", message="Hi")
            await chat.recv()
        await until(lambda: engine.streams[0].closed)
        async with chatting(url) as again:
            resumed = await again.ask("session", session_id=chat.session_id)
            assert resumed["session_id"] == chat.session_id
            assert await again.history() == [("user", "Hi"), ("assistant", "Hello")]


# --- below the protocol

MASK = b"\0\0\0\0"


async def test_a_text_that_is_not_utf8_closes() -> None:
    async with serving(app_of()) as url, chatting(url) as chat:
        chat.socket.transport.write(b"\x81\x82" + MASK + b"\xff\xfe")
        assert await closed(chat) == ([], 1007)


async def test_a_message_of_endless_fragments_closes() -> None:
    async with serving(app_of()) as url, chatting(url) as chat:
        chat.socket.transport.write(b"\x01\x80" + MASK + (b"\x00\x80" + MASK) * 10_000)
        assert await closed(chat) == ([], 1009)


async def test_pings_of_a_client_that_reads_nothing_fill_no_memory() -> None:
    async with serving(app_of()) as url, chatting(url, **GONE) as chat:
        chat.socket.transport.pause_reading()
        ping = b"\x89\xfd" + MASK + b"x" * 125
        for _ in range(100):
            chat.socket.transport.write(ping * 1_000)
            await asyncio.sleep(0)
        await until(lambda: not chat.socket.transport.get_write_buffer_size(), 60)
        held = [connection.transport.get_write_buffer_size() for connection in connections()]
        assert held and max(held) < 1_000_000


def connections() -> list[WebSocketProtocol]:
    """The server's ends of those that are open."""
    # `isinstance` would ask what weak references are to
    found = [item for item in gc.get_objects() if issubclass(type(item), WebSocketProtocol)]
    return [item for item in found if not item.transport.is_closing()]

"""The WebSocket chat, with the fake engine: its protocol, and each message as a request like any other."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from fastapi import FastAPI

from gemma_serve.api_keys import digest_of
from gemma_serve.app import create_app
from gemma_serve.drain import Drain
from gemma_serve.http_protocol import WebSocketProtocol
from gemma_serve.key_file import KeyEntry, write_keys
from gemma_serve.settings import ServerSettings

from .chat_client import chatting, closed, ws
from .conftest import serving, start_fake, until
from .fake_engine import FakeEngine
from .test_app import settings
from .test_metrics import scrape, value
from .test_rate_limit import find_limiter

ALICE, BOB = "sk-ws-alice-0123456789", "sk-ws-bob-0123456789"
HELLO = [("user", "Hi"), ("assistant", "Hello world")]


@pytest.fixture(autouse=True)
def _no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO, "gemma_serve")
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    write_keys(path, [KeyEntry(name="alice", sha256=digest_of(ALICE).hex()), bob()])
    return path


def bob() -> KeyEntry:
    return KeyEntry(name="bob", sha256=digest_of(BOB).hex())


def app_of(engine: FakeEngine | None = None, drain: Drain | None = None, **sections: Any) -> FastAPI:
    return create_app(settings(**sections), engine or FakeEngine(), drain=drain)


# --- the protocol


async def test_a_chat_is_streamed_and_remembered() -> None:
    engine = FakeEngine()
    async with serving(app_of(engine)) as url, chatting(url) as chat:
        assert chat.first["id"] is None
        state = {"model": "gemma-demo", "context_length": 4096, "system": None, "messages": 0}
        assert chat.first["data"] == state | {"ttl_seconds": 86_400}
        assert len(chat.session_id) >= 32

        asked = await chat.send("chat", message="Hi", temperature=0.5)
        replies = await chat.replies()
        assert [reply["type"] for reply in replies] == ["token", "token", "message"]
        assert {(reply["id"], reply["session_id"]) for reply in replies} == {(asked, chat.session_id)}
        assert [reply["data"] for reply in replies[:2]] == [{"text": "Hello"}, {"text": " world"}]
        answer = replies[-1]["data"]
        assert (answer["role"], answer["content"], answer["reasoning"]) == ("assistant", "Hello world", None)
        assert (answer["finish_reason"], answer["model"], answer["messages"]) == ("stop", "gemma-demo", 2)
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        assert 0 < answer["time_to_first_token"] < answer["seconds"]
        assert engine.requests[0].body["temperature"] == 0.5

        assert (await chat.ask("system", message="Be kind."))["data"]["system"] == "Be kind."
        await chat.ask("chat", message="And?", stream=False)
        assert engine.requests[1].body["messages"] == [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello world"},
            {"role": "user", "content": "And?"},
        ]
        assert await chat.history() == [*HELLO, ("user", "And?"), ("assistant", "Hello world")]
        cleared = (await chat.ask("clear"))["data"]
        assert (cleared["messages"], cleared["system"]) == (0, "Be kind.")
        assert await chat.history() == []


async def test_without_streaming_only_the_message_comes() -> None:
    async with serving(app_of()) as url, chatting(url) as chat:
        await chat.send("chat", message="Hi", stream=False)
        assert [reply["type"] for reply in await chat.replies()] == ["message"]


async def test_a_question_is_answered_again_or_edited() -> None:
    engine = FakeEngine()
    async with serving(app_of(engine)) as url, chatting(url) as chat:
        await chat.ask("chat", message="Hi")
        engine.words = ("Good day",)
        assert (await chat.ask("regenerate", seed=1))["data"]["messages"] == 2
        assert await chat.history() == [("user", "Hi"), ("assistant", "Good day")]
        assert engine.requests[-1].body["seed"] == 1
        await chat.ask("chat", message="More")
        await chat.ask("chat", message="Less", keep=2)
        assert await chat.history() == [
            ("user", "Hi"), ("assistant", "Good day"), ("user", "Less"), ("assistant", "Good day"),
        ]  # fmt: skip
        assert (await chat.ask("chat", message="x", keep=5))["data"]["param"] == "keep"


async def test_a_saved_history_is_loaded() -> None:
    async with serving(app_of()) as url, chatting(url) as chat:
        await chat.ask("system", message="Be kind.")
        await chat.ask("chat", message="Hi")
        saved = (await chat.ask("history"))["data"]
        async with chatting(url) as other:
            loaded = (await other.ask("load", **saved))["data"]
            assert (loaded["messages"], loaded["system"]) == (2, "Be kind.")
            assert other.session_id != chat.session_id
            assert await other.history() == HELLO


async def test_cancel_keeps_what_was_said() -> None:
    engine = FakeEngine(hang_at=1)
    async with serving(app_of(engine)) as url, chatting(url) as chat:
        asked = await chat.send("chat", message="Hi")
        assert (await chat.recv())["data"]["text"] == "Hello"
        await chat.send("cancel")
        reply = await chat.recv()
        assert (reply["type"], reply["id"]) == ("cancelled", asked)
        assert (reply["data"]["content"], reply["data"]["finish_reason"]) == ("Hello", "cancelled")
        assert reply["data"]["usage"]["completion_tokens"] == 1
        assert engine.streams[0].closed
        assert await chat.history() == [("user", "Hi"), ("assistant", "Hello")]
        assert (await chat.ask("cancel"))["data"]["code"] == "no_answer_running"


async def test_a_cancel_right_behind_its_question_is_heard() -> None:
    engine = FakeEngine(hang_at=0)
    async with serving(app_of(engine)) as url, chatting(url) as chat:
        for _ in range(5):
            asked = await chat.send("chat", message="Hi")
            await chat.send("cancel")
            reply = await chat.recv()
            assert (reply["type"], reply["id"], reply["data"]["content"]) == ("cancelled", asked, "")
        assert await chat.history() == []  # an answer without text leaves no trace
        assert all(stream.closed for stream in engine.streams)


async def test_one_answer_at_a_time() -> None:
    engine = FakeEngine(hang_at=1)
    async with serving(app_of(engine)) as url, chatting(url) as chat:
        asked = await chat.send("chat", message="Hi")
        await chat.recv()
        for kind in ("chat", "regenerate", "clear", "system", "session"):
            data = {"message": "x"} if kind in ("chat", "system") else {}
            refused = (await chat.ask(kind, **data))["data"]
            assert (refused["code"], refused["status"]) == ("answer_running", 409)
        assert (await chat.ask("history"))["type"] == "history"
        assert (await chat.ask("ping"))["type"] == "pong"
        engine.go_on.set()
        replies = await chat.replies()
        assert (replies[-1]["type"], replies[-1]["id"]) == ("message", asked)


# --- hostile and broken clients

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
        async with httpx.AsyncClient(base_url=url) as http:
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
    async with serving(app, limits=limits) as url, chatting(url, max_queue=1) as chat:
        await chat.send("chat", message="Hi", stream=True)
        await until(lambda: len(engine.streams) == 1)
        await until(lambda: engine.streams[0].closed, 30)
        assert engine.streams[0].usage.completion_tokens < 1_000  # what sockets' buffers hold, and no more
        await until(lambda: find_limiter(app).in_flight() == 0)


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


# --- keys, origins, connections


async def test_a_key_is_needed_and_may_be_a_subprotocol(keys: Path) -> None:
    async with serving(app_of(security={"api_keys_file": keys})) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-API-Key": "wrong"}):
            with pytest.raises(websockets.InvalidStatus) as refused:
                await websockets.connect(ws(url), additional_headers=headers)
            assert refused.value.response.status_code == 401
        offered: Any = ["gemma-chat", f"openai-insecure-api-key.{ALICE}"]
        async with chatting(url, subprotocols=offered) as chat:
            assert chat.socket.subprotocol == "gemma-chat"
            assert (await chat.ask("chat", message="Hi"))["type"] == "message"


async def test_a_key_that_is_revoked_ends_its_connections(keys: Path) -> None:
    async with serving(app_of(security={"api_keys_file": keys})) as url, chatting(url, ALICE) as chat:
        assert (await chat.ask("chat", message="Hi"))["type"] == "message"
        write_keys(keys, [bob()])
        async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": ALICE}) as http:
            async with asyncio.timeout(20):
                while (await http.get("/v1/models")).status_code == 200:
                    await asyncio.sleep(0.05)
        error = (await chat.ask("history"))["data"]
        assert (error["code"], error["status"]) == ("invalid_api_key", 401)
        assert await closed(chat) == ([], 1008)


@pytest.mark.parametrize(
    ("origin", "accepted"),
    [
        ("http://{host}", True),
        ("https://{host}", True),  # behind a proxy that ends TLS
        ("https://app.example.com", True),
        ("https://evil.example.com", False),
        ("http://{host}.evil.example.com", False),
        ("null", False),
        ("", False),
    ],
)
async def test_pages_of_other_origins_are_refused(origin: str, accepted: bool) -> None:
    app = app_of(security={"allowed_origins": ["https://app.example.com"]})
    async with serving(app) as url:
        headers = {"Origin": origin.format(host=httpx.URL(url).netloc.decode())}
        if accepted:
            async with websockets.connect(ws(url), additional_headers=headers):
                return
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(ws(url), additional_headers=headers)
        assert refused.value.response.status_code == 403
        assert json.loads(refused.value.response.body or b"")["error"]["code"] == "origin_not_allowed"


async def test_connections_are_limited_by_client_and_in_all(keys: Path) -> None:
    chat = {"max_connections": 3, "max_connections_per_client": 2}
    app = app_of(chat=chat, security={"api_keys_file": keys})
    async with serving(app) as url, chatting(url, ALICE), httpx.AsyncClient(base_url=url) as http:
        async with chatting(url, ALICE):
            assert await refusal(url, ALICE) == (429, "too_many_connections")
            async with chatting(url, BOB):
                assert await refusal(url, BOB) == (503, "too_many_connections")
            samples = await connections(http, 2)
            assert samples == 2
        async with asyncio.timeout(10):
            while await connections(http, 1) != 1:
                await asyncio.sleep(0.01)
        async with chatting(url, ALICE):
            pass


async def connections(http: httpx.AsyncClient, wanted: int) -> float | None:
    answer = await http.get("/health/metrics", headers={"X-API-Key": ALICE})
    return float(answer.json()["connections"]["websocket"])


async def refusal(url: str, key: str) -> tuple[int, str]:
    async with asyncio.timeout(10):
        while True:
            try:
                async with chatting(url, key):
                    await asyncio.sleep(0.01)  # one that has been closed may still be counted
            except websockets.InvalidStatus as error:
                body = json.loads(error.response.body or b"")
                assert error.response.headers["retry-after"]
                return error.response.status_code, body["error"]["code"]


async def test_an_idle_connection_is_closed_and_its_session_resumed() -> None:
    async with serving(app_of(chat={"idle_timeout_seconds": 0.3})) as url:
        async with chatting(url) as chat:
            await chat.ask("chat", message="Hi")
            replies, code = await closed(chat)
            assert ([reply["data"] for reply in replies], code) == ([{"reason": "idle"}], 1001)
            assert replies[0]["type"] == "going_away"
        async with chatting(url) as again:
            await again.ask("session", session_id=chat.session_id)
            assert await again.history() == HELLO


async def test_a_connection_with_a_long_answer_is_not_idle() -> None:
    engine = FakeEngine(hang_at=1)
    async with serving(app_of(engine, chat={"idle_timeout_seconds": 0.1})) as url, chatting(url) as chat:
        await chat.send("chat", message="Hi")
        await chat.recv()
        await asyncio.sleep(0.4)  # what must not happen has time to happen
        engine.go_on.set()
        assert (await chat.replies())[-1]["type"] == "message"


# --- limits and accounts


async def test_each_message_counts_as_a_request() -> None:
    app = app_of(security={"rate_limit_per_minute": 4})
    async with serving(app) as url, chatting(url) as chat:  # the handshake is the first
        assert (await chat.ask("system", message="x"))["type"] == "session"
        assert (await chat.ask("chat", message="Hi"))["type"] == "message"
        for _ in range(3):
            assert (await chat.ask("ping"))["type"] == "pong"
        assert (await chat.ask("chat", message="Hi"))["type"] == "message"
        refused = (await chat.ask("chat", message="Hi"))["data"]
        assert (refused["code"], refused["type"], refused["status"]) == (
            "rate_limit_exceeded",
            "requests",
            429,
        )
        assert 0 < refused["retry_after"] <= 60
        assert (await chat.ask("ping"))["type"] == "pong"


async def test_the_slot_is_free_before_the_client_knows() -> None:
    app = app_of(security={"max_in_flight": 1})
    async with serving(app) as url, chatting(url) as chat:
        for _ in range(20):
            assert (await chat.ask("chat", message="Hi"))["type"] == "message"
    assert find_limiter(app).in_flight() == 0


async def test_tokens_are_accounted() -> None:
    app = app_of(security={"tokens_per_minute": 300})
    async with serving(app) as url, chatting(url) as chat:
        too_many = (await chat.ask("chat", message="Hi", max_tokens=1000))["data"]
        assert (too_many["type"], too_many["status"], too_many["retry_after"]) == ("tokens", 429, None)
        for _ in range(5):  # each reserves 200, and gives back what it did not take
            assert (await chat.ask("chat", message="Hi", max_tokens=200))["type"] == "message"
        (today,) = await find_limiter(app).usage(1)
        assert (today.prompt_tokens, today.completion_tokens) == (15, 10)


async def test_going_on_over_a_limit_blocks() -> None:
    security = {"rate_limit_per_minute": 1, "block_after_limit_hits": 3}
    async with serving(app_of(security=security)) as url, chatting(url) as chat:
        codes = [(await chat.ask("chat", message="Hi"))["data"]["code"] for _ in range(4)]
    assert codes == ["rate_limit_exceeded"] * 3 + ["client_blocked"]


async def test_a_message_has_a_line_in_the_log_and_its_metrics(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    async with serving(app_of(engine)) as url, httpx.AsyncClient(base_url=url) as http:
        async with chatting(url, additional_headers={"X-Request-Id": "mine"}) as chat:
            answer = (await chat.ask("chat", message="A secret"))["data"]
            await chat.ask("ping")
            engine.hang_at = 0
            await chat.send("chat", message="Hi")
            await chat.send("cancel")
            await chat.recv()
        samples = await scrape(http)
    lines = [record for record in caplog.records if record.name == "gemma_serve.request"]
    first, second, connection = lines[:3]
    assert first.getMessage().startswith("WEBSOCKET /ws chat - 127.0.0.1 - 200 - ")
    assert "- 499 -" in second.getMessage()
    assert connection.getMessage().startswith("WEBSOCKET /ws - 127.0.0.1 - 101 - ")
    assert first.__dict__["completion_tokens"] == 2 and first.__dict__["time_to_first_token"] > 0
    assert answer["request_id"] == "mine-1"
    assert not any("secret" in str(record.__dict__) for record in caplog.records)
    assert value(samples, "model_inference_total", model="gemma-demo", outcome="ok") == 1
    assert value(samples, "model_inference_total", model="gemma-demo", outcome="aborted") == 1


# --- failures


async def test_an_engine_that_fails_is_an_error_and_the_connection_stays() -> None:
    engine = FakeEngine(fail_at=1)
    async with serving(app_of(engine)) as url, chatting(url) as chat:
        error = (await chat.ask("chat", message="Hi"))["data"]
        assert (error["status"], error["type"]) == (500, "server_error")
        assert await chat.history() == [("user", "Hi"), ("assistant", "Hello")]
        engine.fail_at = None
        assert (await chat.ask("regenerate"))["data"]["content"] == "Hello world"


async def test_a_model_that_still_loads_is_an_error_with_when_to_come_back() -> None:
    async with serving(app_of(FakeEngine(ready=False))) as url, chatting(url) as chat:
        error = (await chat.ask("chat", message="Hi"))["data"]
        assert (error["code"], error["status"], error["retry_after"]) == ("engine_loading", 503, 5)


async def test_an_answer_has_a_deadline() -> None:
    engine = FakeEngine(hang_at=1)
    app = app_of(engine, limits={"request_timeout_seconds": 0.2})
    async with serving(app) as url, chatting(url) as chat:
        error = (await chat.ask("chat", message="Hi"))["data"]
        assert (error["code"], error["status"]) == ("deadline_exceeded", 504)
        assert engine.streams[0].closed


# --- the server's end


async def test_shutting_down_waits_for_answers_and_lets_the_idle_go() -> None:
    engine, drain = FakeEngine(hang_at=1), Drain()
    async with serving(app_of(engine, drain)) as url, chatting(url) as busy, chatting(url) as idle:
        await busy.send("chat", message="Hi")
        await busy.recv()
        ending = asyncio.create_task(drain.run(0, 30))
        replies, code = await closed(idle)
        assert ([reply["type"] for reply in replies], code) == (["going_away"], 1001)
        away = await busy.recv()
        assert (away["type"], away["data"]) == ("going_away", {"reason": "shutdown"})
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(ws(url))
        assert refused.value.response.status_code == 503
        assert not ending.done()
        engine.go_on.set()
        replies, code = await closed(busy)
        assert ([reply["type"] for reply in replies], code) == (["token", "message"], 1001)
        assert await ending


async def test_an_answer_that_takes_too_long_is_given_up() -> None:
    engine, drain = FakeEngine(hang_at=1), Drain()
    async with serving(app_of(engine, drain)) as url, chatting(url) as chat:
        await chat.send("chat", message="Hi")
        await chat.recv()
        assert not await drain.run(0, 0.1)
        replies, code = await closed(chat)
    assert [reply["type"] for reply in replies] == ["going_away", "error"]
    assert (replies[1]["data"]["code"], code) == ("server_shutting_down", 1001)


async def test_a_server_that_is_stopped_lets_its_chats_go() -> None:
    server = start_fake()
    try:
        async with chatting(server.url) as chat:
            await chat.ask("chat", message="Hi")
            server.process.terminate()
            replies, code = await closed(chat)
            assert ([reply["data"] for reply in replies], code) == ([{"reason": "shutdown"}], 1001)
    finally:
        assert await asyncio.to_thread(server.end) == 0


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
    async with serving(app_of()) as url, chatting(url) as chat:
        chat.socket.transport.pause_reading()
        ping = b"\x89\xfd" + MASK + b"x" * 125
        for _ in range(100):
            chat.socket.transport.write(ping * 1_000)
            await asyncio.sleep(0)
        await until(lambda: not chat.socket.transport.get_write_buffer_size(), 60)
        held = [
            item.transport.get_write_buffer_size()
            for item in gc.get_objects()
            if issubclass(type(item), WebSocketProtocol)  # `isinstance` would ask what weak references are to
        ]
        assert held and max(held) < 1_000_000

"""Each message of a WebSocket is a request like any other: keys, origins, limits, accounts, the log."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from gemma_serve.api_keys import digest_of
from gemma_serve.key_file import KeyEntry, write_keys

from .chat_client import HELLO, app_of, chatting, closed, ws
from .conftest import serving
from .fake_engine import FakeEngine
from .test_metrics import scrape, value
from .test_rate_limit import find_limiter

pytestmark = pytest.mark.usefixtures("no_errors")

ALICE, BOB = "sk-ws-alice-0123456789", "sk-ws-bob-0123456789"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    write_keys(path, [KeyEntry(name="alice", sha256=digest_of(ALICE).hex()), bob()])
    return path


def bob() -> KeyEntry:
    return KeyEntry(name="bob", sha256=digest_of(BOB).hex())


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
        async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": ALICE}, timeout=60) as http:
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
    async with serving(app) as url, chatting(url, ALICE), httpx.AsyncClient(base_url=url, timeout=60) as http:
        async with chatting(url, ALICE):
            assert await refusal(url, ALICE) == (429, "too_many_connections")
            async with chatting(url, BOB):
                assert await refusal(url, BOB) == (503, "too_many_connections")
            await connections(http, 2)
        await connections(http, 1)
        async with chatting(url, ALICE):
            pass


async def connections(http: httpx.AsyncClient, wanted: int) -> None:
    """Until so many are open: one that has been closed may still be counted."""
    async with asyncio.timeout(10):
        while True:
            answer = await http.get("/health/metrics", headers={"X-API-Key": ALICE})
            if answer.json()["connections"]["websocket"] == wanted:
                return
            await asyncio.sleep(0.01)


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
    async with serving(app_of(chat={"idle_timeout_seconds": 1.5})) as url:
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
    async with serving(app_of(engine, chat={"idle_timeout_seconds": 1})) as url, chatting(url) as chat:
        await chat.send("chat", message="Hi")
        await chat.recv()
        await asyncio.sleep(2)  # what must not happen has time to happen
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
    async with serving(app_of(engine)) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
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

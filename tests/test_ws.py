"""The WebSocket chat's protocol, with the fake engine: answers, failures, the server's end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
import websockets
from starlette.types import Message

from gemma_serve.api import ws_tokens
from gemma_serve.api.streaming import WRITE
from gemma_serve.api.ws_outbox import Outbox
from gemma_serve.api.ws_tokens import Tokens
from gemma_serve.chat_protocol import Sampling
from gemma_serve.drain import Drain
from gemma_serve.engine.base import Delta

from .chat_client import HELLO, app_of, chatting, closed, ws
from .conftest import serving, start_fake
from .fake_engine import FakeEngine
from .test_metrics import scrape, value

pytestmark = pytest.mark.usefixtures("no_errors")


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


async def test_the_parameters_of_an_answer_reach_the_engine() -> None:
    engine = FakeEngine()
    given: dict[str, Any] = {
        "model": "gemma-demo",
        "max_tokens": 9,
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "repetition_penalty": 1.1,
        "length_penalty": 1.1,
        "logit_bias": {"5": 1.0},
        "bad_words": ["x"],
        "seed": 1,
        "stop": ["x"],
        "stop_token_ids": [1],
        "min_tokens": 1,
        "ignore_eos": True,
        "response_format": {"type": "json_object"},
        "structured_outputs": {"choice": ["x"]},
        "reasoning_effort": "none",
        "chat_template_kwargs": {"x": 1},
    }
    assert given.keys() == Sampling.model_fields.keys()
    async with serving(app_of(engine)) as url, chatting(url) as chat:
        for kind, data in (("chat", given | {"message": "Hi"}), ("regenerate", given)):
            assert (await chat.ask(kind, **data))["type"] == "message"
            assert engine.requests[-1].body.items() >= given.items()


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
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            samples = await scrape(http)
    assert value(samples, "model_inference_total", model="gemma-demo", outcome="timeout") == 1


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


async def test_what_could_not_be_sent_at_once_goes_together_and_in_order() -> None:
    sent: list[bytes] = []
    room = False

    def write(texts: list[bytes]) -> bool:
        sent.extend(texts if room else [])
        return room

    async def send(event: Message) -> None:
        sent.append(event["text"].encode())

    tokens = Tokens(Outbox({"extensions": {WRITE: write}}, send), "1", wanted=True)
    for delta in (Delta(0, "", delta={"reasoning": "Hm"}), Delta(0, "Hel"), Delta(0, "lo")):
        tokens.put(delta)
        assert not tokens.flush()
    await tokens.drain()
    room = True
    tokens.put(Delta(0, " world", "stop"))
    assert tokens.flush()
    data = [json.loads(text)["data"] for text in sent]
    assert data == [{"reasoning": "Hm"}, {"text": "Hello"}, {"text": " world"}]
    assert (tokens.text, tokens.reasoning, tokens.finish_reason) == ("Hello world", "Hm", "stop")

    tokens.put(Delta(0, "!"))
    tokens.end()
    assert tokens.flush() and len(sent) == 3  # too late, after what ended the answer
    assert tokens.text == "Hello world!"


async def test_while_a_client_does_not_read_its_steps_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined anew at each step, what waits for it would take longer and longer, from everybody's time."""
    rendered, sent = 0, []
    room = asyncio.Event()

    def token(head: bytes, text: str) -> bytes:
        nonlocal rendered
        rendered += 1
        return text.encode()

    async def send(event: Message) -> None:
        await room.wait()
        sent.append(event["text"])

    monkeypatch.setattr(ws_tokens, "token", token)
    tokens = Tokens(Outbox({"extensions": {WRITE: lambda texts: True}}, send), None, wanted=True)
    tokens.put_texts(["Hel"])
    draining = asyncio.create_task(tokens.drain())
    await asyncio.sleep(0)
    for text in "lo world":
        tokens.put_texts([text])
        assert not tokens.flush()
    assert rendered == 1
    room.set()
    await draining
    assert sent == ["Hel", "lo world"]


async def test_nothing_overtakes_a_message_that_waits() -> None:
    sent: list[str] = []
    room = asyncio.Event()

    async def send(event: Message) -> None:
        await room.wait()
        sent.append(event["text"])

    def write(texts: list[bytes]) -> bool:
        sent.extend(text.decode() for text in texts)
        return True

    out = Outbox({"extensions": {WRITE: write}}, send)
    first = asyncio.create_task(out.send(b"first"))
    await asyncio.sleep(0)
    assert out.waiting and not out.write([b"second"])
    room.set()
    await first
    assert out.write([b"second"])
    assert sent == ["first", "second"]

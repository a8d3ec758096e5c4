"""The WebSocket chat with the real engine."""

from __future__ import annotations

import asyncio
import random
import re

import pytest

from .chat_client import chatting
from .conftest import InProcess, until

pytestmark = pytest.mark.slow
shared = pytest.mark.asyncio(loop_scope="session")

ENDLESS = {"max_tokens": 900, "min_p": 0.0, "temperature": 1.0, "top_k": 0}


@shared
async def test_a_chat_of_three_turns_and_a_reconnect(in_process: InProcess) -> None:
    async with chatting(in_process.url) as chat:
        prompts = []
        for question in ("Hello!", "How are you?", "And now?"):
            await chat.send("chat", message=question, max_tokens=16, temperature=0)
            replies = await chat.replies()
            answer = replies[-1]["data"]
            streamed = "".join(reply["data"]["text"] for reply in replies[:-1])
            assert streamed == answer["content"]
            assert answer["finish_reason"] in ("stop", "length")
            prompts.append(answer["usage"]["prompt_tokens"])
        assert prompts == sorted(set(prompts))  # each holds what was said before
        history = await chat.history()
    async with chatting(in_process.url) as again:
        assert (await again.ask("session", session_id=chat.session_id))["data"]["messages"] == len(history)
        assert await again.history() == history
        assert (await again.ask("chat", message="Bye", max_tokens=4))["type"] == "message"


@shared
async def test_cancel_stops_the_engine_at_once(in_process: InProcess) -> None:
    async with chatting(in_process.url) as chat:
        for _ in range(5):
            await chat.send("chat", message="Tell me a story.", **ENDLESS)
            while (await chat.recv())["type"] != "token":
                pass
            await chat.send("cancel")
            replies = await chat.replies()
            if replies[-1]["type"] == "message":
                continue  # it ended by itself meanwhile
            assert replies[-1]["type"] == "cancelled"
            assert in_process.unfinished() == 0  # when the client hears of it, it is no longer worked on
            assert len(replies) < ENDLESS["max_tokens"] / 2, "it went on to its end"


@shared
async def test_200_clients_that_leave_in_mid_stream_leave_nothing_running(in_process: InProcess) -> None:
    random.seed(6)

    async def leave() -> None:
        async with chatting(in_process.url) as chat:
            await chat.send("chat", message="Tell me a story.", **ENDLESS)
            for _ in range(random.randrange(6)):
                if (await chat.recv())["type"] != "token":
                    return
            if random.random() < 0.5:
                chat.socket.transport.abort()  # without a word

    async def some() -> None:
        for _ in range(10):
            await leave()

    await asyncio.gather(*(some() for _ in range(20)))
    await until(lambda: in_process.unfinished() == 0 and in_process.admission.running == 0, 30)
    await until(lambda: in_process.scheduler_stats().num_running_reqs == 0, 30)


@shared
async def test_a_history_that_outgrows_the_context_loses_its_oldest_turns(in_process: InProcess) -> None:
    async with chatting(in_process.url) as chat:
        await chat.ask("system", message="You are terse.")
        question = "the quick brown fox jumps over the lazy dog " * 8
        dropped, total = 0, 0
        for number in range(12):
            await chat.send("chat", message=f"{number}: {question}", max_tokens=64, temperature=0)
            replies = await chat.replies()
            answer = replies[-1]
            assert answer["type"] == "message", answer
            assert answer["data"]["usage"]["prompt_tokens"] <= 1024 - 64
            total += 2
            if replies[0]["type"] == "trimmed":
                dropped += replies[0]["data"]["dropped"]
                assert replies[0]["data"]["messages"] == total - dropped - 2
            assert answer["data"]["messages"] == total - dropped
        assert dropped > 0
        kept = (await chat.ask("history"))["data"]
        assert kept["system"] == "You are terse."
        assert len(kept["messages"]) == total - dropped
        assert kept["messages"][0]["role"] == "user"
        assert kept["messages"][-2]["content"].startswith("11: ")


@shared
async def test_a_question_that_is_too_long_by_itself_is_an_error(in_process: InProcess) -> None:
    async with chatting(in_process.url) as chat:
        await chat.ask("chat", message="Hi", max_tokens=4)
        error = (await chat.ask("chat", message="fox " * 20_000))["data"]
        assert (error["code"], error["status"]) == ("context_length_exceeded", 400)
        assert len(await chat.history()) == 2  # nothing is lost by it
        assert (await chat.ask("chat", message="Hi", max_tokens=4))["type"] == "message"


@shared
async def test_structured_output(in_process: InProcess) -> None:
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    async with chatting(in_process.url) as chat:
        answer = (await chat.ask("chat", message="x?", response_format=given, max_tokens=64))["data"]
        assert re.fullmatch(r'\s*\{\s*"x"\s*:\s*[12]\s*\}\s*', answer["content"])

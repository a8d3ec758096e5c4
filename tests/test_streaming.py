"""Streams in time: comments in silence, deadlines, and what a client sees of both."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from gemma_serve.api.streaming import WRITE, GenerationStream, Patience
from gemma_serve.app import create_app
from gemma_serve.engine.base import Delta, GenerationRequest
from gemma_serve.settings import Settings

from .conftest import serving, until
from .fake_engine import FakeEngine, FakeStream

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
STREAM = {"messages": MESSAGES, "stream": True}


def settings(**server: float) -> Settings:
    return Settings(model={"name": "gemma-demo"}, server=server)


async def test_comments_keep_a_silent_stream_alive() -> None:
    engine = FakeEngine(("Hello", " you", " all"), hang_at=1)
    app = create_app(settings(keep_alive_seconds=0.02), engine)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        comments, data = 0, []
        async with client.stream("POST", "/v1/chat/completions", json=STREAM) as answer:
            async for line in answer.aiter_lines():
                if line == ": keep-alive":
                    comments += 1
                    if comments == 3:
                        engine.go_on.set()
                elif line:
                    data.append(line)
        assert comments >= 3
        assert data[-1] == "data: [DONE]"
        assert "".join(data).count('"content":') == 4  # the opening chunk, and three words


class Silent(FakeStream):
    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        await self._engine.hang()
        if self.usage.completion_tokens:
            yield []


class SilentEngine(FakeEngine):
    async def stream(self, request: GenerationRequest) -> FakeStream:
        return Silent(self, request)


async def test_an_answer_without_a_token_is_an_error() -> None:
    engine = SilentEngine()
    app = create_app(settings(keep_alive_seconds=0.02), engine)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        async with client.stream("POST", "/v1/chat/completions", json=STREAM) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == ": keep-alive"
            engine.go_on.set()
            assert "without a token" in [line async for line in lines if line and line[0] != ":"][-1]
        answer = await client.post("/v1/chat/completions", json=STREAM)
        assert answer.status_code == 500 and "without a token" in answer.text


async def test_the_first_comment_brings_the_status() -> None:
    engine = FakeEngine(hang_at=0)
    app = create_app(settings(keep_alive_seconds=0.02), engine)
    async with serving(app) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(model="gemma-demo", messages=MESSAGES, stream=True)
        assert (
            engine.streams[0].usage.completion_tokens == 0
        )  # the client has its status, and no token is there
        engine.go_on.set()
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == "Hello world"
        await client.close()


async def test_an_error_after_a_comment_is_told_in_the_stream() -> None:
    engine = FakeEngine(hang_at=0, fail_at=1)
    app = create_app(settings(keep_alive_seconds=0.02), engine)
    async with serving(app) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(model="gemma-demo", messages=MESSAGES, stream=True)
        engine.go_on.set()
        with pytest.raises(openai.APIError, match="the fake engine failed"):
            [chunk async for chunk in stream]
        await client.close()


@pytest.mark.parametrize("accept", ["text/plain", "application/x-ndjson"])
async def test_only_events_have_comments(accept: str) -> None:
    engine = FakeEngine(hang_at=1)
    app = create_app(settings(keep_alive_seconds=0.02), engine)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        asking = asyncio.create_task(
            client.post("/v1/chat/completions", json={"messages": MESSAGES}, headers={"Accept": accept})
        )
        await until(lambda: engine.hanging == 1)
        await asyncio.sleep(0.1)  # five times the interval: a comment would have been sent
        engine.go_on.set()
        assert "keep-alive" not in (await asking).text


@pytest.mark.parametrize(
    ("accept", "answered"),
    [
        ("text/plain", "text/plain"),
        ("text/plain;q=0.9, application/x-ndjson", "text/plain"),
        ("application/x-ndjson", "application/x-ndjson"),
        ("text/plain, application/json, application/*+json, */*", "application/json"),  # Spring's
        ("text/plain, */*; q=0.01", "application/json"),  # jQuery's
        ("*/*", "application/json"),
        ("", "application/json"),
    ],
)
async def test_who_takes_json_gets_it(accept: str, answered: str) -> None:
    app = create_app(settings(), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        body = {"messages": MESSAGES}
        answer = await client.post("/v1/chat/completions", json=body, headers={"Accept": accept})
        assert answer.headers["content-type"].partition(";")[0] == answered


@pytest.mark.parametrize("cached", [False, True])
async def test_a_step_without_text_does_not_end_a_stream_of_text(cached: bool) -> None:
    """As of a model that reasons; an empty chunk would be the end for HTTP, and the rest another answer."""
    engine = FakeEngine(("Hello", "", " world", ""), pause=0.001)
    app = create_app(Settings(model={"name": "gemma-demo"}, cache={"enabled": cached}), engine)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for number in range(2):  # on one connection
            body = {"messages": MESSAGES, "temperature": 0, "max_tokens": number + 1}
            answer = await client.post("/v1/chat/completions", json=body, headers={"Accept": "text/plain"})
            assert answer.text == "Hello world"


async def test_while_a_client_does_not_read_its_steps_cost_nothing() -> None:
    """Joined anew at each step, what waits for it would take longer and longer, from everybody's time."""
    tried, sent = [], []
    room = asyncio.Event()

    class Tried(GenerationStream):
        def write(self, data: bytes) -> bool:
            tried.append(data)
            return super().write(data)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await room.wait()
            sent.append(message["body"])

    async def feed(sink: GenerationStream) -> None:
        sink.put_texts(["Hel"])
        draining = asyncio.create_task(sink.drain())
        await until(lambda: sink._sending)
        for text in "lo world":
            sink.put_texts([text])
            assert not sink.flush()
        room.set()
        await draining

    async def aclose() -> None:
        pass

    async def open() -> Any:
        return SimpleNamespace(tokens=None, note_first_token=lambda: None, feed=feed, aclose=aclose)

    def make_writer(head: Any) -> Any:
        def run(index: int, texts: list[str]) -> bytes:
            return "".join(texts).encode()

        return SimpleNamespace(run=run, opening=lambda n: b"", ending=lambda: b"!")

    stream = Tried(open, make_writer, [], Patience(), 1)
    scope: Any = {"type": "http", "extensions": {WRITE: lambda data: True}}
    receive: Any = asyncio.Event().wait  # the client stays
    await stream(scope, receive, send)
    assert (tried, sent) == ([], [b"Hel", b"lo world", b"!"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_ends_the_work(stream: bool) -> None:
    engine = FakeEngine(hang_at=0)
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        answer = await client.post(
            "/v1/chat/completions",
            json={"messages": MESSAGES, "stream": stream},
            headers={"X-Request-Timeout": "0.05"},
        )
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert "0.05 s" in answer.json()["error"]["message"]
        assert engine.cancelled == 1
        metrics = (await client.get("/metrics")).text
        assert 'model_inference_total{model="gemma-demo",outcome="timeout"} 1.0' in metrics


async def test_a_deadline_in_the_middle_is_the_streams_last_event() -> None:
    engine = FakeEngine(hang_at=1)
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        answer = await client.post("/v1/chat/completions", json=STREAM, headers={"X-Request-Timeout": "0.05"})
        assert answer.status_code == 200
        assert '"code":"deadline_exceeded"' in answer.text.strip().splitlines()[-1]
        assert "[DONE]" not in answer.text
        assert engine.streams[0].closed


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", ""])
async def test_a_wrong_deadline_is_refused(value: str) -> None:
    app = create_app(settings(), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        answer = await client.post(
            "/v1/chat/completions", json={"messages": MESSAGES}, headers={"X-Request-Timeout": value}
        )
        assert answer.status_code == 400
        assert "X-Request-Timeout" in answer.json()["error"]["message"]


async def test_a_full_queue_refuses_before_it_reads_the_body() -> None:
    engine = FakeEngine(hang_at=0)
    engine.capacity = lambda: 1  # type: ignore[method-assign]
    limits = Settings(model={"name": "gemma-demo"}, queue={"max_requests": 1})
    async with (
        serving(create_app(limits, engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        asked = [asyncio.create_task(client.post("/v1/chat/completions", json=STREAM)) for _ in range(3)]
        await until(lambda: sum(task.done() for task in asked) == 1)
        (refused,) = [task.result() for task in asked if task.done()]
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_overloaded"
        assert int(refused.headers["retry-after"]) > 0
        broken = await client.post("/v1/chat/completions", content=b"{")
        assert broken.status_code == 503
        engine.go_on.set()
        assert sorted(answer.status_code for answer in await asyncio.gather(*asked)) == [200, 200, 503]


async def test_a_stream_of_vllms_that_is_left_has_taken_tokens() -> None:
    from vllm.outputs import CompletionOutput, RequestOutput

    from gemma_serve.engine.vllm_streams import Below, ChunkStream

    async def results() -> AsyncGenerator[tuple[int, RequestOutput], None]:
        for prompt_index in (0, 1, 0, 1, 0):
            answer = CompletionOutput(0, "a", [7, 8], None, None)
            yield prompt_index, RequestOutput("x", None, [1, 2, 3], None, [answer], False)

    async def chunks(results: AsyncGenerator[Any, None]) -> AsyncGenerator[str, None]:
        async for _ in results:
            yield 'data: {"choices": [{"index": 0, "text": "a", "logprobs": {}}]}'

    below, source = Below(), results()
    stream = ChunkStream(chunks(below.watched(source)), source, SimpleNamespace(final_usage_info=None), below)
    iterator = aiter(stream)
    for _ in range(3):
        await anext(iterator)
    await stream.aclose()
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens) == (6, 6)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_leaves_nothing_to_the_garbage_collector(stream: bool) -> None:
    """Else it runs all the time, over everything that requests leave behind."""

    def kept() -> int:
        return sum(type(item) is RequestResponseCycle for item in gc.get_objects())

    async with (
        serving(create_app(settings(), FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        gc.collect()
        gc.disable()
        try:
            before = kept()
            for _ in range(10):
                await client.post("/v1/chat/completions", json=STREAM | {"stream": stream})
            assert kept() - before <= 1  # a connection knows its last request
        finally:
            gc.enable()

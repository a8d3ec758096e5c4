"""Equal questions share one generation: who begins it, joins, leaves, pays."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from gemma_serve.admission import Admission
from gemma_serve.app import create_app
from gemma_serve.cache import ResponseCache
from gemma_serve.cached_generation import CachedGenerator
from gemma_serve.engine.base import Delta, GenerationRequest
from gemma_serve.engine.switch import EngineSwitch
from gemma_serve.errors import ServeError
from gemma_serve.metrics import Metrics
from gemma_serve.models import Models

from .chat_client import chatting
from .conftest import serving, until
from .fake_engine import FakeEngine
from .test_api_keys import bearer
from .test_cache import ALICE, ASK, BOB, CHAT, asking, file, settings, storage

__all__ = ["file", "storage"]  # fixtures


def said(text: str) -> str:
    """All text of an answer, whole or streamed."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    choices = [choice for line in lines if line != "[DONE]" for choice in json.loads(line)["choices"]]
    choices.sort(key=lambda choice: int(choice["index"]))
    parts = [choice.get("message") or choice.get("delta") or {} for choice in choices]
    return "".join(part.get("content", "") for part in parts)


def waiting(cache: ResponseCache) -> int:
    """Requests that share what is being generated, those that began it included."""
    return sum(len(flight.seats) for flight in cache.flights.values())


async def test_many_at_once_are_one_generation(storage: str | None) -> None:
    count = 256 if storage is None else 64
    engine = FakeEngine(hang_at=1)
    async with asking(engine, storage) as (http, cache):
        asked = [
            asyncio.create_task(http.post(CHAT, json=ASK | {"stream": n % 2 == 0})) for n in range(count)
        ]
        await until(lambda: waiting(cache) == count, 30)
        engine.go_on.set()
        answers = await asyncio.gather(*asked)
        assert len(engine.requests) == 1
        assert len({answer.text for answer in answers}) == count  # each has an id of its own
        assert all(said(answer.text) == "Hello world" for answer in answers)
        kinds = [answer.headers["x-cache"] for answer in answers]
        assert kinds.count("miss") == 1 and kinds.count("coalesced") == count - 1


async def test_a_websocket_shares_with_http() -> None:
    engine = FakeEngine()
    async with asking(engine) as (http, cache):
        async with chatting(str(http.base_url).rstrip("/")) as chat:
            await http.post(CHAT, json=ASK)
            answer = await chat.ask("chat", message="Hi", temperature=0)
            assert answer["data"]["content"] == "Hello world" and len(engine.requests) == 1
            engine.words = ("Another",)
            answer = await chat.ask("regenerate", temperature=0)
            assert answer["data"]["content"] == "Another" and len(engine.requests) == 2

            engine.hang_at = 0
            await chat.send("chat", message="And?", temperature=0)
            await until(lambda: waiting(cache) == 1 and engine.hanging == 1)
            asked = engine.requests[-1].body["messages"]
            joined = asyncio.create_task(http.post(CHAT, json={"messages": asked, "temperature": 0}))
            await until(lambda: waiting(cache) == 2)
        # The WebSocket has gone; who joined it gets the answer.
        await until(lambda: waiting(cache) == 1)
        engine.go_on.set()
        assert said((await joined).text) == "Another" and len(engine.requests) == 3


async def test_each_who_shares_is_told_how_long_it_waited_itself() -> None:
    engine = FakeEngine(hang_at=0)
    async with asking(engine) as (http, cache):
        url = str(http.base_url).rstrip("/")
        async with chatting(url) as first, chatting(url) as second:
            await first.send("chat", message="Hi", temperature=0)
            await until(lambda: waiting(cache) == 1)
            await second.send("chat", message="Hi", temperature=0)
            await until(lambda: waiting(cache) == 2)
            engine.go_on.set()
            one, other = [(await chat.replies())[-1]["data"] for chat in (first, second)]
            assert one["seconds"] > one["time_to_first_token"] > other["time_to_first_token"] > 0


async def read(http: httpx.AsyncClient, lines: list[str], ask: dict[str, Any] = ASK) -> None:
    async with http.stream("POST", CHAT, json=ask | {"stream": True}) as answer:
        async for line in answer.aiter_lines():
            lines.append(line)


async def test_a_stream_joins_in_progress_and_outlives_who_began_it() -> None:
    engine = FakeEngine(("One", " two", " three"), hang_at=2)
    async with asking(engine) as (http, cache):
        first: list[str] = []
        second: list[str] = []
        leader = asyncio.create_task(read(http, first))
        await until(lambda: any(" two" in line for line in first))
        follower = asyncio.create_task(read(http, second))
        await until(lambda: any(" two" in line for line in second))
        leader.cancel()
        await asyncio.gather(leader, return_exceptions=True)
        (flight,) = cache.flights.values()
        await until(lambda: len(flight.seats) == 1)
        assert not engine.cancelled
        engine.go_on.set()
        await follower
        assert any(" three" in line for line in second) and "data: [DONE]" in second
        assert len(engine.requests) == 1
        assert (await http.post(CHAT, json=ASK)).headers["x-cache"] == "hit"


async def test_who_waits_goes_on_when_who_began_leaves_the_queue() -> None:
    engine = FakeEngine()
    engine.capacity = lambda: 1  # type: ignore[method-assign]
    async with asking(engine) as (http, cache):
        engine.hang_at = 0
        busy = asyncio.create_task(http.post(CHAT, json=ASK | {"max_tokens": 1}))
        await until(lambda: engine.hanging == 1)
        asked = []
        for count in (2, 3, 4):  # in turn, so that it is known who began
            asked.append(asyncio.create_task(http.post(CHAT, json=ASK | {"stream": True})))
            await until(lambda count=count: waiting(cache) == count)  # type: ignore[misc]
        asked[0].cancel()
        await until(lambda: waiting(cache) == 3)
        engine.hang_at = None
        engine.go_on.set()
        assert [said((await task).text) for task in asked[1:]] == ["Hello world"] * 2
        assert (await busy).status_code == 200
        assert len(engine.requests) == 2


def generator_of(engine: FakeEngine) -> CachedGenerator:
    admission = Admission(settings().queue, engine.capacity)
    models = Models(settings(), EngineSwitch(settings(), lambda _: engine))
    return CachedGenerator(engine, models, admission, Metrics(), ResponseCache(settings().cache))


class Words:
    """A sink of a client that reads."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def put(self, delta: Delta) -> None:
        self.words.append(delta.text)

    def flush(self) -> bool:
        return False

    def put_texts(self, texts: list[str]) -> None:
        for text in texts:
            self.put(Delta(0, text))

    async def drain(self) -> None: ...


async def test_nobody_waits_for_who_reads_slowly() -> None:
    engine = FakeEngine()
    generator = generator_of(engine)
    await engine.start()
    stuck, read_again = asyncio.Event(), asyncio.Event()

    class Slow(Words):
        async def drain(self) -> None:
            stuck.set()
            await read_again.wait()

    question = {"messages": [], "temperature": 0, "stream": True}
    requests = [GenerationRequest("chat", question, name, "gemma-demo") for name in "abc"]
    slow, quick, also_quick = Slow(), Words(), Words()
    first, second, third = [await generator.stream(request) for request in requests]
    reading = asyncio.create_task(first.feed(slow))
    async with asyncio.timeout(10):
        await stuck.wait()
        await second.feed(quick)
        await third.feed(also_quick)
        assert also_quick.words == quick.words == ["Hello", " world"]
    assert not reading.done()
    read_again.set()
    await reading
    assert slow.words == quick.words
    for stream in (first, second, third):
        await stream.aclose()
    assert len(engine.requests) == 1 and engine.streams[0].closed


class CannotPut(Words):
    def put(self, delta: Delta) -> None:
        raise ZeroDivisionError


class CannotFlush(Words):
    def flush(self) -> bool:
        raise ZeroDivisionError


@pytest.mark.parametrize("broken", [CannotPut, CannotFlush])
async def test_who_fails_to_write_fails_alone(broken: type[Words]) -> None:
    generator = generator_of(engine := FakeEngine())
    await engine.start()
    question = {"messages": [], "temperature": 0, "stream": True}
    requests = [GenerationRequest("chat", question, name, "gemma-demo") for name in "ab"]
    first, second = [await generator.stream(request) for request in requests]
    quick = Words()
    told = await asyncio.gather(first.feed(broken()), second.feed(quick), return_exceptions=True)
    assert isinstance(told[0], ZeroDivisionError) and told[1] is None and quick.words == ["Hello", " world"]
    await first.aclose()
    await second.aclose()


async def test_a_limit_of_who_began_is_not_told_to_another(file: Path) -> None:
    engine = FakeEngine()
    ask = ASK | {"max_tokens": 2000}  # more than alice may take
    async with asking(engine, None, file, shared_by=("alice", "bob")) as (http, _):
        asked = [http.post(CHAT, json=ask, headers=bearer(key)) for key in (ALICE, ALICE, BOB, ALICE, BOB)]
        statuses = sorted(answer.status_code for answer in await asyncio.gather(*asked))
        assert statuses[:2] == [200, 200] and set(statuses[2:]) <= {200, 429}
        assert len(engine.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_the_last_to_leave_stops_the_generation(stream: bool) -> None:
    engine = FakeEngine(hang_at=0)
    async with asking(engine) as (http, cache):
        asked = [asyncio.create_task(http.post(CHAT, json=ASK | {"stream": stream})) for _ in "abc"]
        await until(lambda: waiting(cache) == 3 and engine.hanging == 1)
        for task in asked:
            assert not engine.cancelled
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await until(lambda: engine.cancelled == 1 and not cache.flights)


async def test_one_failure_is_told_to_all_who_wait() -> None:
    engine = FakeEngine(hang_at=0, fail_at=1, error=ServeError("it broke"))
    async with asking(engine) as (http, cache):
        asked = [asyncio.create_task(http.post(CHAT, json=ASK | {"stream": True})) for _ in range(20)]
        await until(lambda: waiting(cache) == 20)
        engine.go_on.set()
        assert all("it broke" in answer.text for answer in await asyncio.gather(*asked))
        assert len(engine.requests) == 1


# What it costs.


async def test_a_hit_spends_no_tokens_unless_so_set(file: Path) -> None:
    for hits_cost, most in ((False, 20), (True, 2)):
        engine = FakeEngine(usage=None)
        ask = ASK | {"max_tokens": 600}
        async with asking(engine, None, file, hits_cost_tokens=hits_cost) as (http, _):
            statuses, started = [], time.monotonic()
            for _ in range(20):
                answer = await http.post(CHAT, json=ask, headers=bearer(ALICE))
                statuses.append(answer.status_code)
            left = answer.headers["x-ratelimit-remaining-tokens"]
            assert statuses == [200] * 20
            spent = 5 if not hits_cost else 100
            come_back = (time.monotonic() - started) * 1000 / 60
            assert -5 <= int(left) - (1000 - spent) <= 5 + come_back, most
            usage = (await http.get("/v1/usage", headers=bearer(ALICE))).json()["data"][0]
            assert usage["prompt_tokens"] + usage["completion_tokens"] == spent


async def test_only_one_who_can_pay_begins(file: Path) -> None:
    engine = FakeEngine(hang_at=0)
    ask = ASK | {"max_tokens": 600}
    async with asking(engine, None, file) as (http, cache):
        asked = [asyncio.create_task(http.post(CHAT, json=ask, headers=bearer(ALICE))) for _ in range(10)]
        await until(lambda: waiting(cache) == 10)
        engine.go_on.set()
        assert {(await task).status_code for task in asked} == {200}
        too_much = await http.post(CHAT, json=ask | {"max_tokens": 2000}, headers=bearer(ALICE))
        assert too_much.status_code == 429
        assert not cache.flights


async def test_who_leaves_what_goes_on_does_not_get_its_tokens_back(file: Path) -> None:
    """Or any number could be begun, one after the other, with those of one."""
    engine = FakeEngine(hang_at=0)
    ask = ASK | {"max_tokens": 600}  # alice has 1,000 a minute
    async with asking(engine, None, file) as (http, cache):
        leader, follower = (
            asyncio.create_task(http.post(CHAT, json=ask, headers=bearer(ALICE))) for _ in range(2)
        )
        await until(lambda: waiting(cache) == 2 and engine.hanging == 1)
        (flight,) = cache.flights.values()
        leader.cancel()
        await until(lambda: len(flight.seats) == 1)
        other = ask | {"messages": [{"role": "user", "content": "Another question"}]}
        assert (await http.post(CHAT, json=other, headers=bearer(ALICE))).status_code == 429
        engine.go_on.set()
        assert (await follower).status_code == 200
        assert (await http.post(CHAT, json=other, headers=bearer(ALICE))).status_code == 200


async def test_whoever_is_left_pays(file: Path) -> None:
    engine = FakeEngine(hang_at=0)
    async with asking(engine, None, file, shared_by=("alice", "bob")) as (http, cache):
        leader = asyncio.create_task(http.post(CHAT, json=ASK, headers=bearer(ALICE)))
        await until(lambda: engine.hanging == 1)
        follower = asyncio.create_task(http.post(CHAT, json=ASK, headers=bearer(BOB)))
        await until(lambda: waiting(cache) == 2)
        leader.cancel()
        (flight,) = cache.flights.values()
        await until(lambda: len(flight.seats) == 1)
        engine.go_on.set()
        assert (await follower).status_code == 200
        usage = (await http.get("/v1/usage", headers=bearer(BOB))).json()["data"][0]
        assert usage["completion_tokens"] == 2


async def test_hits_are_served_while_the_queue_is_full() -> None:
    engine = FakeEngine()
    given = settings().model_copy(update={"queue": settings().queue.model_copy(update={"max_requests": 1})})
    engine.capacity = lambda: 1  # type: ignore[method-assign]
    app = create_app(given, engine)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        await http.post(CHAT, json=ASK)
        engine.hang_at = 0
        busy = [asyncio.create_task(http.post(CHAT, json=ASK | {"max_tokens": n})) for n in (1, 2)]
        await until(lambda: engine.hanging == 1 and app.state.admission.waiting == 1)
        assert (await http.post(CHAT, json=ASK | {"max_tokens": 3})).status_code == 503
        assert (await http.post(CHAT, json=ASK)).headers["x-cache"] == "hit"
        engine.go_on.set()
        assert [answer.status_code for answer in await asyncio.gather(*busy)] == [200, 200]

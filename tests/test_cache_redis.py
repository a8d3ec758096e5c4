"""The response cache in Redis: shared by servers, and what happens when that is slow, gone, full or wrong."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from gemma_serve.app import create_app
from gemma_serve.cache.redis_store import RedisStore

from .conftest import running_redis, serving, until
from .fake_engine import FakeEngine
from .test_cache import ASK, CHAT, asking, settings
from .test_cached_generation import said, waiting


async def test_servers_share_it_and_go_on_without_it(tmp_path: Path) -> None:
    with running_redis(tmp_path / "socket") as url:
        given = settings(url)
        given = given.model_copy(
            update={"storage": given.storage.model_copy(update={"timeout_seconds": 10, "fail_open": False})}
        )
        one, two = (create_app(given, FakeEngine()) for _ in "ab")
        async with serving(one) as first, serving(two) as second, httpx.AsyncClient(timeout=60) as http:
            await http.post(first + CHAT, json=ASK)
            await until(lambda: not one.state.cache.flights)
            assert (await http.post(second + CHAT, json=ASK)).headers["x-cache"] == "hit"
            (name,) = [key for key in await one.state.cache.store._redis.keys() if b"answers" in key]
            for field in await one.state.cache.store._redis.hkeys(name):
                await one.state.cache.store._redis.hset(name, field, b"[1,2]")
            assert (await http.post(second + CHAT, json=ASK)).headers["x-cache"] == "miss"  # unreadable
            await one.state.cache.store._redis.shutdown(nosave=True, force=True)
            again = await http.post(first + CHAT, json=ASK)
            assert (again.status_code, again.headers["x-cache"]) == (200, "miss")
            assert (await http.delete(first + "/v1/cache")).status_code == 503


async def test_a_redis_that_hangs_costs_a_bounded_wait(tmp_path: Path) -> None:
    with running_redis(tmp_path / "socket") as url:
        given = settings(url)
        given = given.model_copy(
            update={"storage": given.storage.model_copy(update={"timeout_seconds": 0.2})}
        )
        engine = FakeEngine()
        app = create_app(given, engine)
        async with serving(app) as at, httpx.AsyncClient(base_url=at, timeout=30) as http:
            await http.post(CHAT, json=ASK)
            await until(lambda: not app.state.cache.flights)
            pid = (await app.state.cache.store._redis.info("server"))["process_id"]
            os.kill(pid, signal.SIGSTOP)
            try:
                for number in range(20):  # more would pile up than answers of one time-out
                    answer = await http.post(CHAT, json=ASK | {"max_tokens": number % 2 + 1})
                    assert (answer.status_code, answer.headers["x-cache"]) == (200, "miss")
                await until(lambda: not app.state.cache.flights)
                assert len(engine.requests) == 21
            finally:
                os.kill(pid, signal.SIGCONT)

            async def hit() -> bool:
                return (await http.post(CHAT, json=ASK)).headers["x-cache"] == "hit"

            async with asyncio.timeout(20):  # what was kept is there again
                while not await hit():
                    await asyncio.sleep(0.05)


async def test_what_began_before_another_server_emptied_it_is_not_kept(redis_server: str) -> None:
    given, engine = settings(redis_server), FakeEngine(hang_at=0)
    one, two = create_app(given, engine), create_app(given, FakeEngine())
    async with serving(one) as first, serving(two) as second, httpx.AsyncClient(timeout=30) as http:
        asked = asyncio.create_task(http.post(first + CHAT, json=ASK))
        await until(lambda: engine.hanging == 1)
        assert (await http.delete(second + "/v1/cache")).json() == {"deleted": 0}
        engine.go_on.set()
        assert (await asked).status_code == 200
        await until(lambda: not one.state.cache.flights)
        assert (await http.post(second + CHAT, json=ASK)).headers["x-cache"] == "miss"


@pytest.mark.parametrize("lost", ["answers", "used", "expires", "bytes"])
async def test_it_outlives_what_a_full_redis_evicts(redis_server: str, lost: str) -> None:
    async with asking(FakeEngine(), redis_server, max_bytes=3000) as (http, cache):

        async def ask(length: int) -> str:
            answer = await http.post(CHAT, json=ASK | {"max_tokens": length})
            await until(lambda: not cache.flights)
            return answer.headers["x-cache"]

        for length in range(1, 9):  # more than there is room for
            await ask(length)
        assert isinstance(cache.store, RedisStore)
        (name,) = [key for key in cache.store._keys if key.endswith(lost)]
        assert await cache.store._redis.delete(name)
        await ask(20)
        assert await ask(20) == "hit"
        for length in range(30, 39):
            await ask(length)
        assert await ask(38) == "hit" and await ask(30) == "miss"  # the limit holds


async def test_who_waits_goes_on_when_who_began_leaves_while_redis_is_asked(tmp_path: Path) -> None:
    with running_redis(tmp_path / "socket") as url:
        given = settings(url)
        patient = given.storage.model_copy(update={"timeout_seconds": 5.0})
        app = create_app(given.model_copy(update={"storage": patient}), engine := FakeEngine())
        async with serving(app) as at, httpx.AsyncClient(base_url=at, timeout=20) as http:
            cache = app.state.cache
            pid = (await cache.store._redis.info("server"))["process_id"]
            os.kill(pid, signal.SIGSTOP)
            try:
                asked = []
                for count in (1, 2):
                    asked.append(asyncio.create_task(http.post(CHAT, json=ASK)))
                    await until(lambda count=count: waiting(cache) == count)  # type: ignore[misc]
                asked[0].cancel()
                await until(lambda: waiting(cache) == 1)
            finally:
                os.kill(pid, signal.SIGCONT)
            assert said((await asked[1]).text) == "Hello world" and len(engine.requests) == 1


@asynccontextmanager
async def slow_line(path: Path, url: str, bytes_per_second: int) -> AsyncIterator[str]:
    """A socket at `path` to the Redis of `url`, which carries so much in each direction."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(bytes_per_second // 50):
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(len(data) / bytes_per_second)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, to_them = await asyncio.open_unix_connection(url.removeprefix("unix://"))
        await asyncio.gather(carry(reader, to_them), carry(theirs, writer))

    async with await asyncio.start_unix_server(accept, path):
        yield f"unix://{path}"


async def test_an_answer_too_large_for_the_line_does_not_make_redis_pass_for_away(
    tmp_path: Path, redis_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    engines = [FakeEngine(("x" * 16_000_000,)) for _ in range(2)]
    async with slow_line(tmp_path / "line", redis_server, 4_000_000) as line:
        given = settings(line)
        hasty = given.storage.model_copy(update={"timeout_seconds": 3.0})
        near = given.storage.model_copy(update={"url": redis_server})  # which keeps it
        one, two = (
            create_app(given.model_copy(update={"storage": storage}), engine)
            for storage, engine in zip((hasty, near), engines, strict=True)
        )
        async with serving(one) as far, serving(two) as at_hand, httpx.AsyncClient(timeout=30) as http:

            async def ask(url: str, **more: Any) -> str:
                answer = await http.post(url + CHAT, json=ASK | more)
                await until(lambda: not one.state.cache.flights and not two.state.cache.flights)
                return answer.headers["x-cache"]

            assert [await ask(url) for url in (far, at_hand, far, at_hand)] == ["miss", "miss", "miss", "hit"]
            engines[0].words = ("Hello",)
            assert [await ask(far, max_tokens=7) for _ in range(2)] == ["miss", "hit"]
    assert "cannot be used" not in caplog.text

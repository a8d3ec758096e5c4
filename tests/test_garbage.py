"""A request leaves nothing that Python would have to search for; what does is found before it is much."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gemma_serve.app import create_app
from gemma_serve.garbage import Bodies
from gemma_serve.settings import Settings

from .conftest import InProcess, serving, until
from .fake_engine import FakeEngine

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOO_LONG = {"messages": [{"role": "user", "content": "word " * 2000}]}
REQUESTS = {
    "whole": CHAT,
    "streamed": CHAT | {"stream": True},
    "with tools": CHAT | {"tools": [TOOL]},
    "too long": TOO_LONG,
    "refused by vLLM": CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
}


@pytest.fixture
def searched() -> Iterator[None]:
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


def garbage() -> Counter[str]:
    """The server's, that a search finds; this process has the client, too."""
    gc.collect()
    kinds = Counter(f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.garbage)
    return Counter(
        {kind: count for kind, count in kinds.items() if kind.startswith(("gemma_serve", "vllm", "jinja2"))}
    )


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("kind", REQUESTS)
async def test_a_request_leaves_none(in_process: InProcess, searched: None, kind: str) -> None:
    async with httpx.AsyncClient(base_url=in_process.url, timeout=120) as client:
        for _ in range(2):
            answer = await client.post("/v1/chat/completions", json=REQUESTS[kind])
            assert answer.status_code in (200, 400)
        assert not garbage()


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
async def test_one_whose_client_leaves_leaves_none(in_process: InProcess, searched: None) -> None:
    body = CHAT | {"stream": True, "max_tokens": 500, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=in_process.url, timeout=120) as client:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            await anext(answer.aiter_lines())
        await until(lambda: in_process.unfinished() == 0)
        await asyncio.sleep(0)
        assert not garbage()


@pytest.mark.asyncio
@pytest.mark.parametrize("streamed", [False, True])
async def test_what_the_cache_keeps_leaves_none(searched: None, streamed: bool) -> None:
    settings = Settings(model={"name": "gemma-demo"}, cache={"enabled": True})
    body = CHAT | {"temperature": 0, "stream": streamed}
    async with (
        serving(create_app(settings, FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        asked = [client.post("/v1/chat/completions", json=body) for _ in range(3)]
        answers = [*await asyncio.gather(*asked), await client.post("/v1/chat/completions", json=body)]
        kinds = Counter(answer.headers["x-cache"] for answer in answers)
        assert kinds["miss"] == 1 and kinds["hit"] >= 1 and kinds.total() == 4
        assert not garbage()


class Cycle:
    def __init__(self) -> None:
        self.itself: Any = self


def test_large_bodies_are_searched_for() -> None:
    gc.disable()
    try:
        bodies, lost = Bodies(), weakref.ref(Cycle())
        for _ in range(6):
            bodies.add(10_000_000)
        assert lost() is not None
        bodies.add(10_000_000)
        assert lost() is None
    finally:
        gc.enable()

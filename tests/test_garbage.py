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

from gemma_serve.garbage import Bodies

from .conftest import InProcess, until

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOO_LONG = {"messages": [{"role": "user", "content": "word " * 2000}]}
REQUESTS = {
    "whole": CHAT,
    "streamed": CHAT | {"stream": True},
    "with tools": CHAT | {"tools": [TOOL]},
    "kept in the cache": CHAT | {"temperature": 0},
    "streamed and kept": CHAT | {"temperature": 0, "stream": True, "max_tokens": 5},
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

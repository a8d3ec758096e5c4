"""A client that leaves takes its work with it, in every phase and on every path."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest

from .conftest import InProcess, until

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
ENDLESS = {"max_tokens": 900, "ignore_eos": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", HELLO),
    "n": ("/v1/chat/completions", HELLO | {"n": 8}),
    "logprobs": ("/v1/chat/completions", HELLO | {"logprobs": True}),
    "greedy n": ("/v1/chat/completions", HELLO | {"n": 4, "temperature": 0}),
    "completion": ("/v1/completions", {"prompt": "Once"}),
    "prompts": ("/v1/completions", {"prompt": ["Once", "Twice", "Thrice"], "n": 2}),
    "echo": ("/v1/completions", {"prompt": ["Once", "Twice"], "echo": True}),
}
ANSWERS = {"n": 8, "prompts": 6, "echo": 2}


def made(server: InProcess) -> int:
    """Tokens since the start."""
    return server.engine.report().generated_tokens or 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", CASES)
async def test_nothing_is_left_running(
    in_process: InProcess, caplog: pytest.LogCaptureFixture, name: str, stream: bool
) -> None:
    path, body = CASES[name]
    before = made(in_process)
    async with httpx.AsyncClient(base_url=in_process.url, timeout=60) as client:
        request = asyncio.create_task(client.post(path, json=body | ENDLESS | {"stream": stream}))
        await until(lambda: in_process.unfinished() > 0)
        request.cancel()
        await until(lambda: in_process.unfinished() == 0)
    assert made(in_process) - before < ANSWERS.get(name, 1) * ENDLESS["max_tokens"] / 2, (
        "they ended by themselves"
    )
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_stream_that_is_closed_after_some_tokens(in_process: InProcess) -> None:
    body = HELLO | ENDLESS | {"stream": True, "n": 3}
    async with httpx.AsyncClient(base_url=in_process.url, timeout=60) as client:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            pieces = answer.aiter_raw()
            for _ in range(5):
                await anext(pieces)
        await until(lambda: in_process.unfinished() == 0)

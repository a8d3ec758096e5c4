"""Adaptive flushing joins writes; what is written stays the same."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import orjson
import pytest

from gemma_serve.engine import direct

from .conftest import InProcess

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

PROMPTS = [f"Tell me story number {number}, please: " for number in range(12)]
GREEDY = {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "stream_options": {"include_usage": True}}


async def reads(client: httpx.AsyncClient, prompt: str) -> list[bytes]:
    """What comes of one stream, as it comes."""
    body = GREEDY | {"prompt": prompt, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        return [data async for data in answer.aiter_raw()]


def said(data: list[bytes]) -> tuple[str, list[bytes]]:
    """The text, and each different form of an event without it and without what is of one request alone.

    Not each event: what comes before a stream's first token is taken, vLLM itself puts into one.
    """
    texts, forms = [], dict[bytes, None]()
    for line in b"".join(data).splitlines():
        if line.startswith(b"data: {"):
            chunk = orjson.loads(line[6:])
            texts += [choice.pop("text") for choice in chunk["choices"]]
            del chunk["id"], chunk["created"]
            line = orjson.dumps(chunk)
        forms[line] = None
    return "".join(texts), list(forms)


async def test_streams_are_the_same_byte_for_byte_with_and_without_it(
    in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving: Any = in_process.engine._serving
    flushes: direct.Flushes = serving.supervisor.flushes
    async with httpx.AsyncClient(base_url=in_process.url, timeout=120) as client:

        async def streams() -> list[list[bytes]]:
            return await asyncio.gather(*(reads(client, prompt) for prompt in PROMPTS))

        monkeypatch.setattr(flushes, "longest", 0.0)
        at_once = await streams()
        monkeypatch.setattr(flushes, "longest", 0.2)  # kept as long as with no time to spare
        monkeypatch.setattr(direct, "_SPARE", -2.0)
        monkeypatch.setattr(direct, "_FULL", -1.0)
        joined = await streams()
        body = GREEDY | {"prompt": PROMPTS[0]}
        del body["stream_options"]
        whole = (await client.post("/v1/completions", json=body)).json()
    assert [said(data) for data in joined] == [said(data) for data in at_once]
    assert sum(map(len, joined)) < sum(map(len, at_once)) / 2, "nothing was joined"
    text, _ = said(joined[0])
    assert text == whole["choices"][0]["text"]  # made by vLLM's own handler, of one output

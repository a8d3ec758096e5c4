"""The end of the server, as its clients and its load balancer see it."""

from __future__ import annotations

import asyncio

import httpx

from gemma_serve.app import create_app
from gemma_serve.drain import Drain
from gemma_serve.settings import Settings

from .conftest import serving, until
from .fake_engine import FakeEngine

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_ready_turns_first_and_requests_are_refused_last() -> None:
    engine, drain = FakeEngine(hang_at=0), Drain()
    app = create_app(Settings(model={"name": "gemma-demo"}), engine, drain=drain)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        running = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await until(lambda: engine.hanging == 1)

        drain.begun = True
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert (await client.get("/health/live")).status_code == 200
        still = await client.get("/v1/models")
        assert (still.status_code, still.headers["connection"]) == (200, "close")

        ending = asyncio.create_task(drain.run(0, 30))
        await until(lambda: drain.refusing)
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert refused.json()["error"]["code"] == "server_shutting_down"
        assert int(refused.headers["retry-after"]) > 0
        assert not ending.done()

        engine.go_on.set()
        assert (await running).status_code == 200
        assert await ending


async def test_what_takes_too_long_is_given_up() -> None:
    drain = Drain()
    drain.enter()
    assert not await drain.run(0, 0.01)
    drain.leave()
    assert drain.active == 0

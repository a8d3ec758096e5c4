"""An engine that does not come back at once."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import httpx

from gemma_serve import demo_model

from ..conftest import start_server, until
from .conftest import engine_process
from .load import Load


async def test_it_fails_to_start_twice_then_starts(tmp_path: Path) -> None:
    model = tmp_path / "gemma-demo"
    shutil.copytree(demo_model.PATH, model)
    weights = model / "model.safetensors"
    server = start_server("--config", "demo", "--model", str(model))
    load = Load(server.url, 24)
    try:
        await asyncio.to_thread(server.wait_ready)
        undisturbed = await load.run()
        running = asyncio.create_task(load.run())
        await until(lambda: load.tokens > 200, 120)
        weights.rename(model / "away")
        engine_process(server, "EngineCore").send_signal(signal.SIGKILL)
        await until(lambda: server.text.count("gemma-demo: restarting") >= 3, 120)
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            health = (await client.get("/health/ready")).json()
            assert health["status"] == "restarting"
            assert "safetensors" in health["reason"]
        (model / "away").rename(weights)
        assert await running == undisturbed
    finally:
        server.end()
        await load.aclose()


async def test_it_gives_up_and_ends_with_1(tmp_path: Path) -> None:
    model = tmp_path / "gemma-demo"
    shutil.copytree(demo_model.PATH, model)
    server = start_server("--config", "demo", "--model", str(model), "--set", "supervisor.max_restarts=1")
    load = Load(server.url, 8)
    try:
        await asyncio.to_thread(server.wait_ready)
        running = asyncio.create_task(load.run())
        await until(lambda: load.tokens > 10, 120)
        (model / "model.safetensors").unlink()
        engine_process(server, "EngineCore").send_signal(signal.SIGKILL)
        answers = await running
        assert all(isinstance(answer, Exception) for answer in answers)
        assert await asyncio.to_thread(server.wait, 60) == 1
        assert "started again 1 times within 600 s (supervisor.max_restarts)" in server.text
    finally:
        server.end()
        await load.aclose()

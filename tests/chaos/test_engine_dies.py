"""The engine is killed, starved or frozen under every kind of client: they notice a pause, nothing else."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import time
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import httpx
import psutil
import pytest
import pytest_asyncio

from gemma_serve import demo_model

from ..conftest import ServerProcess, start_server, until
from ..processes import below, gone
from .conftest import FULL, run_out_of_memory
from .load import Answer, Load

STREAMS = 64
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the embedded model, whose weights can be taken away."""
    folder = tmp_path_factory.mktemp("model") / "gemma-demo"
    shutil.copytree(demo_model.PATH, folder)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model: Path) -> AsyncIterator[ServerProcess]:
    server = start_server(
        *("--config", "demo", "--model", str(model), "--set", "supervisor.max_restarts=100"),
        *("--set", "health.stall_seconds=2", "--set", "health.stall_restart_seconds=8"),
        *("--set", "server.drain_delay_seconds=10"),
    )
    try:
        await asyncio.to_thread(server.wait_ready)
        yield server
    finally:
        code = server.end()
    assert code == 0, server.text[-5000:]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def load(server: ServerProcess) -> AsyncIterator[Load]:
    load = Load(server.url, STREAMS)
    yield load
    await load.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(load: Load) -> list[Answer | BaseException]:
    answers = await load.run()
    assert not failures(answers, answers)
    return answers


def failures(answers: list[Answer | BaseException], wanted: list[Answer | BaseException]) -> list[str]:
    """A line for each answer that failed or differs."""
    return [
        f"{index}: {answer!r:.300} instead of {right!r:.300}"
        for index, (answer, right) in enumerate(zip(answers, wanted, strict=True))
        if isinstance(answer, BaseException) or answer != right
    ]


def the_engine(server: ServerProcess) -> psutil.Process:
    (engine,) = below(server.process.pid, "EngineCore")
    return engine


@pytest.mark.parametrize("seed", range(5 if FULL else 1))
@pytest.mark.parametrize("how", ["killed", "out of memory", "told to end"])
async def test_killed(
    server: ServerProcess, load: Load, undisturbed: list[Answer | BaseException], how: str, seed: int
) -> None:
    moment = random.Random(f"{how}{seed}").randrange(50, load.tokens * 2 // 3)  # of those of the last run
    running = load.begin()
    await until(lambda: load.tokens >= moment, 120)
    if how == "out of memory" and seed == 0:
        await run_out_of_memory(the_engine(server))
    elif how == "told to end":
        the_engine(server).send_signal(signal.SIGTERM)
    else:
        the_engine(server).send_signal(signal.SIGKILL)
    assert not failures(await running, undisturbed)


async def test_frozen(server: ServerProcess, load: Load, undisturbed: list[Answer | BaseException]) -> None:
    running = load.begin()
    await until(lambda: load.tokens >= 500, 120)
    frozen = the_engine(server)
    frozen.send_signal(signal.SIGSTOP)
    since = time.time()
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        # The others may have ended before it froze.
        waiting = asyncio.create_task(client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3}))
        while (await client.get("/health/ready")).status_code == 200:
            await asyncio.sleep(0.05)
        seen = time.time() - since
        history = (await client.get("/health/status")).json()["engine"]["history"]
        stalled = [datetime.fromisoformat(one["time"]) for one in history if one["state"] == "stalled"][-1]
        noticed = stalled.timestamp() - since
        print(f"stalled {noticed:.1f} s after it froze, seen after {seen:.1f} s, with stall_seconds=2")
        assert noticed < 8, "it was only noticed when it was killed"
        assert (await client.get("/health/live")).status_code == 200
        assert not failures(await running, undisturbed)
        assert (await waiting).status_code == 200
        assert (await client.get("/health/ready")).status_code == 200
    assert not frozen.is_running()


@pytest.mark.timeout(900)
async def test_it_fails_to_start_twice_then_starts(
    server: ServerProcess, model: Path, load: Load, undisturbed: list[Answer | BaseException]
) -> None:
    running = load.begin()
    client = httpx.AsyncClient(base_url=server.url, timeout=120)
    await until(lambda: load.tokens >= 500, 120)
    restarts = server.text.count("gemma-demo: restarting")
    weights, away = model / "model.safetensors", model / "away"
    weights.rename(away)
    the_engine(server).send_signal(signal.SIGKILL)
    try:
        await until(lambda: server.text.count("gemma-demo: restarting") >= restarts + 3, 400)
        health = (await client.get("/health/ready")).json()
    finally:
        away.rename(weights)
    assert health["status"] == "restarting"
    assert "model weights" in health["reason"]
    assert not failures(await running, undisturbed)
    await client.aclose()


async def test_sigterm_lets_all_streams_finish(
    server: ServerProcess, load: Load, undisturbed: list[Answer | BaseException]
) -> None:
    """The last of this server."""
    children = below(server.process.pid)
    running = load.begin()
    await until(lambda: load.tokens > 300, 120)
    server.process.send_signal(signal.SIGTERM)
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        while (await client.get("/health/ready")).status_code == 200:
            await asyncio.sleep(0.01)
        # What a lagging load balancer sends in the delay is served.
        late = await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3})
        assert late.status_code == 200
    assert not failures(await running, undisturbed)
    assert await asyncio.to_thread(server.wait, 30) == 0
    await until(lambda: gone(children))

"""Health: which state the server is in, told to those who may know."""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from gemma_serve import __version__
from gemma_serve.admission import Admission
from gemma_serve.app import create_app
from gemma_serve.engine.base import EngineReport, EngineState, EngineStatus
from gemma_serve.settings import Settings, digest
from gemma_serve.stats import Stats

from .conftest import InProcess, running_redis, serving, until
from .fake_engine import FakeEngine
from .test_api_keys import KEY, bearer, file  # noqa: F401  # a fixture
from .test_app import CHAT, settings

STREAM = CHAT | {"stream": True}


async def test_status() -> None:
    engine = FakeEngine(ready=False)
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        engine.status.set(EngineState.LOADING, "loading weights")
        engine.status.set(EngineState.FAILED, error="no such model")
        answer = await client.get("/health/status")
        again = (await client.get("/health/status")).json()
    assert answer.status_code == 200  # it was asked about the server, not whether it is well
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert (body["status"], body["reason"]) == ("failed", "no such model")
    assert body["versions"]["gemma_serve"] == __version__
    assert body["model"]["id"] == "gemma-demo"
    assert body["device"] is None  # not known before it has loaded
    assert body["settings_sha256"] == digest(settings())
    assert body["dependencies"] == {"redis": "not used"}
    assert again["uptime_seconds"] > body["uptime_seconds"] > 0
    history = body["engine"]["history"]
    assert [(change["state"], change["phase"]) for change in history] == [
        ("loading", "starting"),
        ("loading", "loading weights"),
        ("failed", ""),
    ]
    times = [datetime.fromisoformat(change["time"]) for change in history]
    assert times == sorted(times)


def test_the_history_is_bounded() -> None:
    status = EngineStatus()
    for number in range(100):
        status.set(EngineState.LOADING, f"phase {number}")
    assert [change.phase for change in status.history] == [f"phase {number}" for number in range(80, 100)]


def test_the_digest_tells_settings_apart_and_no_secrets() -> None:
    def of(**sections: object) -> str:
        return digest(settings(**sections))

    assert of() == of() != of(server={"port": 1})
    assert of(security={"api_keys": ["sk-1"]}) == of(security={"api_keys": ["sk-2"]}) != of()
    assert of(engine={"hf_token": "a"}) == of(engine={"hf_token": "b"})
    urls = [{"url": f"redis://user:{password}@host:6379/0"} for password in ("a", "b")]
    assert of(storage=urls[0]) == of(storage=urls[1]) != of()


@pytest.mark.parametrize("path", ["/health/status", "/health/metrics"])
async def test_who_may_read(file: Path, path: str) -> None:  # noqa: F811
    app = create_app(settings(security={"api_keys_file": file}), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, headers=bearer("sk-wrong"))).status_code == 401
        for key in (KEY, "sk-test-admin-0123456789"):  # of any scope
            assert (await client.get(path, headers=bearer(key))).status_code == 200
        for public in ("/health", "/health/live", "/health/ready"):
            assert (await client.get(public)).status_code == 200


async def test_metrics_before_and_after_work() -> None:
    engine = FakeEngine(("a", "b", "c"), pause=0.01)
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        before = (await client.get("/health/metrics")).json()
        assert before["time_to_first_token_seconds"] == {"p50": None, "p95": None, "p99": None}
        assert before["connections"] == {"http": 1, "websocket": 0}
        await client.post("/v1/chat/completions", json=STREAM)
        async with asyncio.timeout(10):
            while True:
                body = (await client.get("/health/metrics")).json()
                if body["tokens_per_second"]["10s"]:
                    break
                await asyncio.sleep(0.05)
    assert body["running"] == body["waiting"] == 0
    assert 0 < body["tokens_per_second"]["60s"] <= 3
    assert 0.01 <= body["time_to_first_token_seconds"]["p50"] <= body["time_to_first_token_seconds"]["p99"]
    assert body["inter_token_seconds"]["p95"] >= 0.01
    assert body["memory"]["rss_bytes"] > 10_000_000
    assert body["cache_hit_rate"] is None


async def test_running_and_waiting() -> None:
    engine = FakeEngine(hang_at=0)
    engine.capacity = lambda: 1  # type: ignore[method-assign]
    async with (
        serving(create_app(settings(), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        requests = [asyncio.create_task(client.post("/v1/chat/completions", json=CHAT)) for _ in range(3)]
        async with asyncio.timeout(10):
            while (body := (await client.get("/health/metrics")).json())["waiting"] != 2:
                await asyncio.sleep(0.01)
        assert body["running"] == 1
        assert body["connections"]["http"] == 4
        engine.go_on.set()
        await asyncio.gather(*requests)


async def test_a_full_queue_is_not_ready_and_a_long_one_is() -> None:
    engine = FakeEngine(hang_at=0)
    engine.capacity = lambda: 1  # type: ignore[method-assign]
    async with (
        serving(create_app(settings(queue={"max_requests": 3}), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):

        async def waiting(count: int) -> httpx.Response:
            async with asyncio.timeout(10):
                while (await client.get("/health/metrics")).json()["waiting"] != count:
                    await asyncio.sleep(0.01)
            return await client.get("/health/ready")

        requests = [asyncio.create_task(client.post("/v1/chat/completions", json=CHAT)) for _ in range(3)]
        assert (await waiting(2)).status_code == 200
        requests.append(asyncio.create_task(client.post("/v1/chat/completions", json=CHAT)))
        ready = await waiting(3)
        assert (ready.status_code, ready.json()["status"]) == (503, "overloaded")
        assert int(ready.headers["retry-after"]) > 0
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503  # it told the truth
        assert (await client.get("/health/live")).status_code == 200
        engine.go_on.set()
        assert [answer.status_code for answer in await asyncio.gather(*requests)] == [200] * 4
        assert (await client.get("/health/ready")).status_code == 200


async def test_a_full_queue_is_ready_where_it_is_to_be() -> None:
    engine = FakeEngine(hang_at=0)
    engine.capacity = lambda: 1  # type: ignore[method-assign]
    full = settings(queue={"max_requests": 1}, health={"ready_when_full": True})
    async with (
        serving(create_app(full, engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        requests = [asyncio.create_task(client.post("/v1/chat/completions", json=CHAT)) for _ in range(2)]
        async with asyncio.timeout(10):
            while (await client.get("/health/metrics")).json()["waiting"] != 1:
                await asyncio.sleep(0.01)
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert (await client.get("/health/ready")).status_code == 200
        engine.go_on.set()
        assert [answer.status_code for answer in await asyncio.gather(*requests)] == [200] * 2


async def test_how_far_a_load_is() -> None:
    engine = FakeEngine(ready=False)
    app = create_app(settings(), engine)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        engine.status.set(EngineState.LOADING, "loading the weights")
        assert (await client.get("/health/ready")).json() == {
            "status": "loading",
            "phase": "loading the weights",
        }
        engine.report = lambda: EngineReport(loaded=0.25)  # type: ignore[method-assign]
        body = (await client.get("/health")).json()
        assert (body["phase"], body["share"]) == ("loading the weights", 0.25)
        engine.status.set(EngineState.READY)
        assert (await client.get("/health/ready")).json() == {"status": "ready"}


async def test_redis_up_and_away(tmp_path: Path) -> None:
    storage = {"prefix": f"test-{uuid.uuid4().hex[:8]}", "timeout_seconds": 5}
    with ExitStack() as stack:
        redis_url = stack.enter_context(running_redis(tmp_path / "socket"))
        app = create_app(settings(storage=storage | {"url": redis_url}), FakeEngine())
        async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:

            async def redis() -> str:
                return str((await client.get("/health/status")).json()["dependencies"]["redis"])

            assert await redis() == "up"
            stack.close()
            async with asyncio.timeout(20):
                while await redis() != "away":
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize("fail_open", [False, True])
async def test_ready_means_that_requests_pass_without_redis(fail_open: bool, tmp_path: Path) -> None:
    with ExitStack() as stack:
        redis_url = stack.enter_context(running_redis(tmp_path / "socket"))
        storage = {"url": redis_url, "timeout_seconds": 0.5, "fail_open": fail_open}
        given = settings(storage=storage, security={"rate_limit_per_minute": 6000})
        async with (
            serving(create_app(given, FakeEngine())) as url,
            httpx.AsyncClient(base_url=url, timeout=60) as client,
        ):
            assert (await client.get("/health/ready")).status_code == 200
            stack.close()
            async with asyncio.timeout(20):
                while True:
                    ready = await client.get("/health/ready")
                    asked = await client.post("/v1/chat/completions", json=CHAT)
                    details = (await client.get("/health/status")).json()
                    if details["dependencies"]["redis"] == "away" and (fail_open or ready.status_code == 503):
                        break
                    await asyncio.sleep(0.1)
            assert asked.status_code == ready.status_code == (200 if fail_open else 503)
            assert fail_open or ready.json()["status"] == "storage_unavailable"
            stack.enter_context(running_redis(tmp_path / "socket"))
            async with asyncio.timeout(20):
                while (await client.get("/health/ready")).status_code != 200:
                    await asyncio.sleep(0.05)


async def test_the_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gemma_serve.stats")
    engine = FakeEngine(hang_at=1)
    given = Settings(model={"name": "gemma-demo"}, log={"stats_interval_seconds": 0.05})
    async with (
        serving(create_app(given, engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        await asyncio.sleep(0.2)  # what must not come cannot be waited for
        assert not lines(caplog)
        request = asyncio.create_task(client.post("/v1/chat/completions", json=STREAM))
        await until(lambda: len(lines(caplog)) >= 2)
        engine.go_on.set()
        await request
    assert "1 running, 0 waiting, " in lines(caplog)[0]
    assert " tokens/s, memory " in lines(caplog)[0]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "gemma_serve.stats"]


async def test_no_lines_when_they_are_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gemma_serve.stats")
    engine = FakeEngine(hang_at=0)
    admission = Admission(settings().queue, engine.capacity)
    async with Stats(engine, admission, log_seconds=0).running():
        slot = await admission.enter(1)
        await asyncio.sleep(0.1)
        slot.leave()
    assert not lines(caplog)


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
async def test_of_the_real_engine(in_process: InProcess) -> None:
    body = {"model": "gemma-demo", "prompt": "a", "max_tokens": 64, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=in_process.url, timeout=120) as client:
        answers = [client.post("/v1/completions", json=body | {"stream": True}) for _ in range(4)]
        assert {answer.status_code for answer in await asyncio.gather(*answers)} == {200}
        async with asyncio.timeout(60):
            while not (busy := (await client.get("/health/metrics")).json())["tokens_per_second"]["60s"]:
                await asyncio.sleep(0.05)
        status = (await client.get("/health/status")).json()
    assert busy["memory"]["kv_cache_bytes"] == 100_000_000
    assert busy["kv_cache_use"] == 0
    assert busy["inter_token_seconds"]["p50"] > 0
    assert status["status"] == status["engine"]["state"] == "ready"
    assert status["device"]["cuda_available"] == (status["device"]["type"] == "cuda")
    assert status["versions"]["vllm"] and status["versions"]["torch"]
    phases = [change["phase"] for change in status["engine"]["history"]]
    assert "starting the engine and loading the weights" in phases


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
async def test_who_comes_right_after_the_output_loop_has_failed_is_served(
    in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_process.engine._llm is not None

    def fail(*args: object, **kwargs: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("by the test")

    monkeypatch.setattr(in_process.engine._llm.output_processor, "process_outputs", fail)
    body = {"prompt": "a", "max_tokens": 3}
    async with httpx.AsyncClient(base_url=in_process.url, timeout=60) as client:
        answers = [await client.post("/v1/completions", json=body) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [500, 200]
        assert (await client.get("/health/ready")).status_code == 200

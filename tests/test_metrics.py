"""What Prometheus reads: the names, bounded labels, and numbers that are true."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gemma_serve.app import create_app
from gemma_serve.drain import Drain
from gemma_serve.engine.base import EngineState
from gemma_serve.errors import InvalidRequest, ServeError
from gemma_serve.key_file import write_keys
from gemma_serve.metrics import Recent

from .conftest import ALICE, ROOT, SCRAPER, ServerProcess, clean_environ, serving, until
from .fake_engine import FakeEngine
from .test_api_keys import bearer, entry
from .test_app import CHAT, settings

STREAM = CHAT | {"stream": True}
KEY = "sk-metrics-0123456789"


@asynccontextmanager
async def client_of(engine: FakeEngine, **sections: object) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        serving(create_app(settings(**sections), engine)) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
    ):
        yield client


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(client: httpx.AsyncClient, **headers: str) -> Samples:
    answer = await client.get("/metrics", headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def labels_of(samples: Samples, name: str) -> list[dict[str, str]]:
    return [dict(labels) for found, labels in samples if found == name]


async def test_requests_by_method_route_and_status() -> None:
    async with client_of(FakeEngine()) as client:
        await client.post("/v1/chat/completions", json=CHAT)
        await client.post("/v1/chat/completions", json=STREAM)
        await client.post("/v1/chat/completions", json=CHAT | {"messages": 3})
        await client.get("/v1/models/gemma-demo")
        await client.get("/v1/models/nobody")
        await client.get("/v1/chat/completions")
        for path in ("/nowhere", "/v1/x", "/wp-login.php"):
            await client.get(path)
        samples = await scrape(client)
    chat = {"method": "POST", "endpoint": "/v1/chat/completions"}
    model = {"method": "GET", "endpoint": "/v1/models/{model:path}"}
    assert value(samples, "http_requests_total", **chat, status="200") == 2
    assert value(samples, "http_requests_total", **chat, status="400") == 1
    assert value(samples, "http_requests_total", **model, status="200") == 1
    assert value(samples, "http_requests_total", **model, status="404") == 1
    assert value(samples, "http_requests_total", **(chat | {"method": "GET"}), status="405") == 1
    assert value(samples, "http_requests_total", method="GET", endpoint="none", status="404") == 3
    assert value(samples, "http_request_duration_seconds_count", **chat) == 3
    assert value(samples, "active_connections_total", type="http") == 1  # the scrape itself
    assert value(samples, "active_connections_total", type="websocket") == 0


async def test_a_method_of_the_clients_own_is_no_label() -> None:
    async with client_of(FakeEngine()) as client:
        await client.request("PROPFIND", "/v1/models")
        samples = await scrape(client)
    methods = {labels["method"] for labels in labels_of(samples, "http_requests_total")}
    assert methods == {"other"}


async def test_streams_are_timed_to_the_last_byte_and_not_held_back() -> None:
    engine = FakeEngine(hang_at=1)
    async with client_of(engine) as client:
        async with client.stream("POST", "/v1/chat/completions", json=STREAM) as answer:
            assert "assistant" in await anext(texts := answer.aiter_text())  # while the engine hangs
            samples = await scrape(client)
            assert value(samples, "active_connections_total", type="http") == 2
            assert not labels_of(samples, "http_request_duration_seconds_count")
            began = time.perf_counter()
            await scrape(client)  # any time will do
            held = time.perf_counter() - began
            engine.go_on.set()
            assert "[DONE]" in "".join([text async for text in texts])
        samples = await scrape(client)
    chat = {"method": "POST", "endpoint": "/v1/chat/completions"}
    total = value(samples, "http_request_duration_seconds_sum", **chat)
    assert total is not None and total >= held


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hang_at", [0, 1])
async def test_a_client_that_leaves_is_499(stream: bool, hang_at: int) -> None:
    engine = FakeEngine(hang_at=hang_at)
    async with client_of(engine) as client:
        request = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": stream}))
        await until(lambda: engine.hanging == 1)
        request.cancel()
        await until(lambda: engine.cancelled == 1)
        chat = {"method": "POST", "endpoint": "/v1/chat/completions"}
        async with asyncio.timeout(10):
            while value(samples := await scrape(client), "http_requests_total", **chat, status="499") != 1:
                await asyncio.sleep(0.01)
    requests = [
        labels for labels in labels_of(samples, "http_requests_total") if labels.items() >= chat.items()
    ]
    assert len(requests) == 1
    assert value(samples, "model_inference_total", model="gemma-demo", outcome="aborted") == 1
    assert value(samples, "active_connections_total", type="http") == 1


async def test_generations_and_their_tokens(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    write_keys(keys, [entry("alice", KEY, scopes=("inference", "metrics"))])
    engine = FakeEngine(("a", "b", "c"), pause=0.01)
    async with client_of(engine, security={"api_keys_file": keys}) as client:
        await client.post("/v1/chat/completions", json=STREAM, headers=bearer(KEY))
        await client.post("/v1/chat/completions", json=CHAT, headers=bearer(KEY))
        samples = await scrape(client, **bearer(KEY))
        recent = (await client.get("/health/metrics", headers=bearer(KEY))).json()
    model = {"model": "gemma-demo"}
    assert value(samples, "model_inference_total", **model, outcome="ok") == 2
    assert value(samples, "model_inference_duration_seconds_count", **model) == 2
    assert value(samples, "gemma_prompt_tokens_total", **model, key="alice") == 6
    assert value(samples, "gemma_completion_tokens_total", **model, key="alice") == 6
    assert value(samples, "gemma_queue_wait_seconds_count") == 2
    assert value(samples, "gemma_time_to_first_token_seconds_count", **model) == 1  # streams only
    assert value(samples, "gemma_inter_token_latency_seconds_count", **model) == 1
    mean = value(samples, "gemma_inter_token_latency_seconds_sum", **model)
    assert mean is not None and mean >= 0.01
    for name in ("time_to_first_token_seconds", "inter_token_seconds"):
        assert recent[name]["p50"] == recent[name]["p99"] >= 0.01


@pytest.mark.parametrize(("error", "outcome"), [(ServeError("x"), "error"), (InvalidRequest("x"), "refused")])
@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_failures(body: dict[str, Any], error: ServeError, outcome: str) -> None:
    async with client_of(FakeEngine(fail_at=0, error=error)) as client:
        await client.post("/v1/chat/completions", json=body)
        samples = await scrape(client)
    assert value(samples, "model_inference_total", model="gemma-demo", outcome=outcome) == 1
    assert len(labels_of(samples, "model_inference_total")) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_relayed_generations(stream: bool) -> None:
    engine = FakeEngine(usage={"input_tokens": 5, "output_tokens": 7})
    async with client_of(engine) as client:
        answer = await client.post("/v1/messages", json={"model": "gemma-demo", "stream": stream})
        assert answer.status_code == 200
        samples = await scrape(client)
    assert value(samples, "model_inference_total", model="gemma-demo", outcome="ok") == 1
    assert value(samples, "gemma_prompt_tokens_total", model="gemma-demo", key="") == 5
    assert value(samples, "gemma_completion_tokens_total", model="gemma-demo", key="") == 7


async def test_rejections_by_limit() -> None:
    security = {"rate_limit_per_minute": 2, "tokens_per_day": 50}
    async with client_of(FakeEngine(), security=security) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 429  # 256 may come
        statuses = [(await client.get("/v1/models")).status_code for _ in range(3)]
        assert statuses == [200, 429, 429]
        samples = await scrape(client)
    assert value(samples, "gemma_limit_rejections_total", reason="tokens_per_day") == 1
    assert value(samples, "gemma_limit_rejections_total", reason="requests_per_minute") == 2
    # Each reason that the README names is there, from 0 on, and no other.
    line = (ROOT / "README.md").read_text().partition("| `gemma_limit_rejections_total` | `reason` | ")[2]
    named = set(re.findall(r"`(\w+)`", line.partition("\n")[0]))
    assert named == {labels["reason"] for labels in labels_of(samples, "gemma_limit_rejections_total")}


async def test_rejections_by_the_queue() -> None:
    engine = FakeEngine(hang_at=0)
    engine.capacity = lambda: 1  # type: ignore[method-assign]
    async with client_of(engine, queue={"max_requests": 1}) as client:
        requests = [asyncio.create_task(client.post("/v1/chat/completions", json=CHAT)) for _ in range(2)]
        async with asyncio.timeout(10):
            while value(await scrape(client), "gemma_queue_length") != 1:
                await asyncio.sleep(0.01)
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503
        samples = await scrape(client)
        engine.go_on.set()
        await asyncio.gather(*requests)
    assert value(samples, "gemma_limit_rejections_total", reason="queue_requests") == 1


async def test_websockets_are_counted_while_they_are_open() -> None:
    app = create_app(settings(), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        async with websockets.connect(url.replace("http", "ws") + "/ws"):
            samples = await scrape(client)
            assert value(samples, "active_connections_total", type="websocket") == 1
        async with asyncio.timeout(10):
            while value(await scrape(client), "active_connections_total", type="websocket"):
                await asyncio.sleep(0.01)


async def test_restarts_stalls_and_drained_requests() -> None:
    engine, drain = FakeEngine(), Drain()
    engine.resumed = 3
    app = create_app(settings(), engine, drain=drain)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        engine.status.set(EngineState.STALLED)
        stalled = await scrape(client)
        assert value(stalled, "gemma_engine_state", state="stalled") == 1
        assert value(stalled, "gemma_engine_state", state="ready") == 0
        engine.status.set(EngineState.RESTARTING)
        engine.status.set(EngineState.READY)
        await client.get("/v1/models")
        drain.begun = True
        await client.get("/v1/models")
        samples = await scrape(client)
    before, after = (value(given, "gemma_engine_stalled_seconds_total") for given in (stalled, samples))
    assert before is not None and after is not None and 0 < before < after
    assert value(samples, "gemma_engine_restarts_total") == 1
    assert value(samples, "gemma_resumed_requests_total") == 3
    assert value(samples, "gemma_drained_requests_total") == 1


def test_percentiles() -> None:
    recent = Recent()
    assert recent.percentiles() == {"p50": None, "p95": None, "p99": None}
    for number in range(101):
        recent.add(number)
    assert recent.percentiles() == {"p50": 50, "p95": 95, "p99": 99}


NAMED = [
    "http_requests_total",
    "http_request_duration_seconds_bucket",
    "active_connections_total",
    "model_inference_total",
    "model_inference_duration_seconds_bucket",
    'memory_usage_bytes{type="rss"}',
    'memory_usage_bytes{type="kv_cache"}',
    "cpu_usage_percent",
    "gemma_time_to_first_token_seconds_bucket",
    "gemma_inter_token_latency_seconds_bucket",
    'gemma_prompt_tokens_total{key="alice"}',
    'gemma_completion_tokens_total{key="alice"}',
    'gemma_limit_rejections_total{reason="requests_per_minute"}',
    "gemma_queue_wait_seconds_bucket",
    "gemma_queue_length",
    'gemma_engine_state{state="ready"}',
    "gemma_engine_restarts_total",
    "gemma_resumed_requests_total",
    "gemma_engine_stalled_seconds_total",
    "gemma_drained_requests_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_success_total",
]


@contextmanager
def prometheus(folder: Path, target: str, key: str, labels: Mapping[str, str] | None = None) -> Iterator[str]:
    """Debian's Prometheus, which scrapes `target` each second and adds `labels`; its URL."""
    scrape = {
        "job_name": "gemma",
        "scrape_interval": "1s",
        "authorization": {"credentials": key},
        "static_configs": [{"targets": [target], "labels": dict(labels or {})}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(["prometheus", *options], cwd=folder, stderr=log, env=clean_environ())
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_a_real_prometheus_scrapes_the_real_server(live: ServerProcess, tmp_path: Path) -> None:
    with httpx.Client(base_url=live.url, timeout=120, headers=bearer(ALICE)) as client:
        body = STREAM | {"max_tokens": 16, "ignore_eos": True}
        statuses = [client.post("/v1/chat/completions", json=body).status_code for _ in range(6)]
        assert statuses[:2] == [200, 200] and 429 in statuses  # a minute may begin meanwhile
        assert client.get("/metrics").status_code == 403
    with (
        prometheus(tmp_path, live.url.removeprefix("http://"), SCRAPER) as url,
        httpx.Client(base_url=url) as client,
    ):
        deadline = time.monotonic() + 60
        missing = NAMED
        while missing and time.monotonic() < deadline:
            missing = [name for name in missing if not found(client, name)]
            time.sleep(0.1)
        assert not missing, (tmp_path / "prometheus.log").read_text()
    live.wait_for(r"INFO - \d+ running, \d+ waiting, [\d.]+ tokens/s, KV cache [\d.]+%, memory [\d.]+ GB")


def found(client: httpx.Client, query: str) -> bool:
    try:
        answer = client.get("/api/v1/query", params={"query": query}).json()
    except (httpx.TransportError, ValueError):  # not up yet
        return False
    return bool(answer["status"] == "success" and answer["data"]["result"])

"""Engines of several processes behind our server, on the CPU: tensor and data parallel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from gemma_serve.engine.node import Node
from gemma_serve.errors import StartupError
from gemma_serve.settings import Settings

from .conftest import ServerProcess, start_server
from .processes import below

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]  # 30 to 90 s; workers share cores with what else runs

CHAT = {"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "ignore_eos": True}
DEMO = ("--config", "demo", "--set=engine.kv_cache_memory_bytes=100000000", "--set=engine.max_num_seqs=8")


@contextmanager
def running(*options: str, environ: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    server = start_server(*DEMO, *options, environ=environ)
    try:
        yield server
    finally:
        code = server.end()
    assert code == 0, server.text[-5000:]


def metrics(url: str) -> dict[str, Any]:
    return dict(httpx.get(f"{url}/health/metrics", timeout=30).json())


def answer(url: str, tokens: int) -> str:
    body = CHAT | {"max_tokens": tokens}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=170)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == tokens
    return str(reply.json()["choices"][0]["message"]["content"])


def test_tensor_parallel() -> None:
    """Two workers, a core each, where the machine has two. When one is killed, its answers go on."""
    cores = sorted(os.sched_getaffinity(0))
    bind = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    with running("--set=engine.tensor_parallel_size=2", environ=bind) as server:
        server.wait_ready()
        undisturbed = answer(server.url, 256)
        with ThreadPoolExecutor(1) as pool:
            disturbed = pool.submit(answer, server.url, 256)
            while metrics(server.url)["running"] == 0:
                assert not disturbed.done()
            (worker,) = below(server.process.pid, "Worker_TP1")
            worker.kill()
            assert disturbed.result() == undisturbed
        assert server.text.count("gemma-demo: restarting") == 1
        assert "Worker_TP0" in server.text


def test_data_parallel() -> None:
    """Two engines behind one server; both get work, as much as both can take."""
    environ = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    options = ("--set=engine.data_parallel_size=2", "--set=queue.max_requests=0")
    with running(*options, environ=environ) as server:
        server.wait_ready()
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: answer(server.url, 32), range(16)))
        assert len(set(answers)) == 1
        text = httpx.get(f"{server.url}/metrics", timeout=30).text
        served = [
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("vllm:generation_tokens_total")
        ]
        assert len(served) == 2 and all(served), text


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        ({}, "engine.nnodes = 1"),
        ({"nnodes": 2, "node_rank": 0, "master_addr": "x"}, "rank 0 is the leader's"),
        ({"nnodes": 2, "node_rank": 2, "master_addr": "x"}, "a node has a rank from 1"),
    ],
)
def test_a_node_is_told_who_it_is(engine: dict[str, object], sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence):
        Node(Settings(model={"name": "gemma-demo"}, engine=engine))

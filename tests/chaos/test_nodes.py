"""An engine over two "nodes", which are processes here: it answers, and outlives its death.

On the CPU only tensor parallel works over nodes (a pipeline's first request crashes vLLM's CPU worker), and
each token waits for the processes of both: minutes on two cores, so not in every run of the tests.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from ..conftest import start
from ..processes import below
from ..test_parallel import DEMO, answer, running

NODES = {"nnodes": 2, "tensor_parallel_size": 2, "master_addr": "127.0.0.1"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("CHAOS") != "full", reason="takes minutes: `make chaos` runs it"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_over_two_nodes_and_again_when_the_engine_dies() -> None:
    """The leader starts another engine, the node joins it, and the request goes on."""
    environ = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    shared = [f"--set=engine.{name}={value}" for name, value in NODES.items()]
    shared.append(f"--set=engine.master_port={free_port()}")
    script = str(Path(sys.executable).with_name("gemma-server"))
    node = start(script, "node", *DEMO, *shared, "--set=engine.node_rank=1", environ=environ)
    try:
        with running(*shared, environ=environ) as server:
            server.wait_ready()
            undisturbed = answer(server.url, 12)
            with ThreadPoolExecutor(1) as pool:
                request = pool.submit(answer, server.url, 12)
                wait_for_work(server.url)
                (core,) = below(server.process.pid, "EngineCore")
                core.kill()
                assert request.result() == undisturbed
            assert "restarting" in server.text
            assert "this node joins the next engine" in node.text
            # Told to end, as in a rollout, a node stays for as long as its leader answers.
            node.process.send_signal(signal.SIGTERM)
            node.wait_for("staying until the leader has gone")
            assert answer(server.url, 8)
        assert node.wait(60) == 0
    finally:
        if node.process.poll() is None:
            node.process.kill()
            node.wait()


def wait_for_work(url: str) -> None:
    deadline = time.monotonic() + 60
    while httpx.get(f"{url}/health/metrics", timeout=30).json()["running"] != 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)

"""The server as a process, with the real engine: how it starts, fails and ends."""

from __future__ import annotations

import json
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest

from .conftest import START_SECONDS, ServerProcess, start, start_server, until
from .processes import below, gone

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


def sockets_in(folder: str) -> list[Path]:
    return list(Path(folder).glob("gemma-serve-*"))


def test_the_port_is_open_while_the_model_loads_and_sigterm_ends_it_then() -> None:
    server = start_server("--config", "demo")
    seconds = time.monotonic() - server.started
    print(f"live after {seconds:.1f} s")
    with httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.get("/health/live").status_code == 200
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "loading")
        assert ready.json()["phase"]
        answer = client.post("/v1/chat/completions", json=HELLO)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    server.wait_for("loading the weights")
    children = below(server.process.pid)
    assert server.end() == 0
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert "Traceback" not in server.text


def test_a_model_that_cannot_be_loaded_ends_it_with_a_sentence() -> None:
    """In other words: `test_load_errors.py`."""
    server = start_server("--model", "google/gemma-2b-it", environ={"HF_HUB_OFFLINE": "1"})
    assert server.wait(START_SECONDS) == 1
    (line,) = [line for line in server.log if " - CRITICAL - " in line]
    assert "found neither as a local folder nor on Hugging Face" in line
    assert "Traceback" not in server.text


@pytest.mark.slow
def test_what_the_engine_refuses_is_told_with_its_cause() -> None:
    server = start_server("--config", "demo", "--set", "engine.kv_cache_memory_bytes=1000")
    assert server.wait(START_SECONDS) == 1
    (line,) = [line for line in server.log if " - CRITICAL - " in line]
    assert "No available memory for the cache blocks" in line


@pytest.mark.parametrize(("hard", "wanted"), [(4096, 4096), (16_384, 10_512)])
def test_as_many_files_as_connections_are_allowed(hard: int, wanted: int) -> None:
    code = (
        "import resource; from gemma_serve.server import _allow_files;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (1024, {hard})); _allow_files(10_000);"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.skip(f"no process may have {hard} files here (ulimit -Hn)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"({wanted}, {hard})"
    assert ("too few for 10000 connections" in result.stderr) == (hard == 4096)


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start("-m", "gemma_serve", "serve", "--config", "demo", "--port", str(port))
        assert server.wait() == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in server.text
    assert "Traceback" not in server.text


@pytest.mark.slow
async def test_json_logs_and_the_death_of_the_engine() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        server = start_server(
            *("--config", "demo", "--log-format", "json", "--set", "supervisor.max_restarts=0"),
            environ={"TMPDIR": temporary},
        )
        try:
            server.wait_ready()
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                await client.post("/v1/chat/completions", json=HELLO, headers={"X-Request-Id": "json-1"})
            children = below(server.process.pid)
            (engine,) = below(server.process.pid, "EngineCore")
            assert sockets_in(temporary)
            engine.kill()
            assert server.wait(30) == 1
            await until(lambda: gone(children))
            assert not sockets_in(temporary)
        finally:
            server.end()
    entries = [json.loads(line) for line in server.log]
    assert any(entry.get("process") == "EngineCore" for entry in entries)
    request = next(entry for entry in entries if entry.get("path") == "/v1/chat/completions")
    assert request["request_id"] == "json-1"
    assert request["model"] == "gemma-demo"
    assert request["completion_tokens"] > 0
    assert (
        "process ended unexpectedly; it is not started again"
        in next(e for e in entries if e["level"] == "CRITICAL")["message"]
    )


def test_every_log_line_has_our_format(live: ServerProcess) -> None:
    line_format = re.compile(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - (DEBUG|INFO|WARNING|ERROR|CRITICAL) - "
    )
    assert any("[EngineCore]" in line for line in live.log)
    assert not [line for line in live.log if not line_format.match(line)]


def test_uvicorn_serves_it_for_development() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start(
        "-m", "uvicorn", "gemma_serve.main:app", "--port", str(port), environ={"GEMMA_CONFIG": "demo"}
    )  # fmt: skip
    try:
        server.wait_for("loading, importing vLLM")
        # uvicorn listens a little later.
        with httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=30) as client:
            assert client.get(f"http://127.0.0.1:{port}/health/live").status_code == 200
    finally:
        server.end()


@pytest.mark.parametrize("how", [["--workers", "2"], ["--workers=3"]])
def test_uvicorn_workers_are_refused(how: list[str]) -> None:
    server = start("-m", "uvicorn", "gemma_serve.main:app", "--port", "0", *how)
    server.wait()
    assert "Run one worker" in server.text
    assert "importing vLLM" not in server.text


def test_uvicorn_with_a_wrong_setting() -> None:
    server = start("-m", "uvicorn", "gemma_serve.main:app", environ={"GEMMA_SERVER_PROT": "1"})
    assert server.wait() == 1
    assert "did you mean server.port?" in server.text
    assert "Traceback" not in server.text

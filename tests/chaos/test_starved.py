"""Nothing left of what a process needs: the server sheds load or goes on, and never spins."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterator

import httpx
import psutil
import pytest

from ..conftest import ROOT, until
from .test_shutdown import free_ports

FILES = 128


@contextlib.contextmanager
def fake_server(port: int, stderr: str = "/dev/null") -> Iterator[subprocess.Popen[bytes]]:
    settings = json.dumps({"server": {"port": port}})
    with open(stderr, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fake_server", settings],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(30) == 0


async def answering(client: httpx.AsyncClient) -> None:
    async def once() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return (await client.get("/health/ready")).status_code == 200
        return False

    async with asyncio.timeout(60):
        while not await once():
            await asyncio.sleep(0.05)


async def test_a_full_disk_for_logs() -> None:
    (port,) = free_ports(1)
    with fake_server(port, "/dev/full"):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            await answering(client)
            for _ in range(20):
                answer = await client.post("/v1/completions", json={"prompt": "Hi"})
                assert answer.status_code == 200


async def test_no_file_descriptors_left() -> None:
    (port,) = free_ports(1)
    with fake_server(port) as process:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            await answering(client)
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
            opening = (asyncio.open_connection("127.0.0.1", port) for _ in range(4 * FILES))
            opened = await asyncio.gather(*opening, return_exceptions=True)
            connections = [each for each in opened if isinstance(each, tuple)]
            server = psutil.Process(process.pid)
            await until(lambda: server.num_fds() >= FILES - 2)
            # Who is connected is served, and the rest cost nothing.
            before, seconds = server.cpu_times(), 2.0
            await asyncio.sleep(seconds)
            after = server.cpu_times()
            assert (await client.get("/health/ready")).status_code == 200
            used = after.user + after.system - before.user - before.system
            print(f"{used / seconds:.0%} of a core while no file descriptor is left")
            assert used < seconds / 2, "it spins"
            for _, writer in connections:
                writer.transport.abort()
        async with httpx.AsyncClient(base_url=url, timeout=60) as newcomer:
            await answering(newcomer)


@pytest.fixture(autouse=True)
def enough_files_here() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16 * FILES)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

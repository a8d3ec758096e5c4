"""Real servers for the tests: one with the real engine for the whole session, others as a test needs them."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
import redis
import uvicorn
from fastapi import FastAPI

from gemma_serve.admission import Admission
from gemma_serve.api_keys import digest_of
from gemma_serve.app import create_app
from gemma_serve.engine.lifecycle import VLLMEngine
from gemma_serve.key_file import KeyEntry, KeyLimits, write_keys
from gemma_serve.protocols import protocols
from gemma_serve.rate_limit import window
from gemma_serve.settings import ServerSettings, Settings

ROOT = Path(__file__).parent.parent
START_SECONDS = 240  # 25 on a quiet machine; CI's is shared


@dataclass
class ServerProcess:
    """`gemma-server serve` in a process of its own; `log` grows with its stderr."""

    process: subprocess.Popen[str]
    started: float = field(default_factory=time.monotonic)
    log: list[str] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()

    @property
    def text(self) -> str:
        return "".join(self.log)

    def read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def wait_for(self, pattern: str, seconds: float = START_SECONDS) -> re.Match[str]:
        """Until the log has `pattern`; fails with the log when the process ends first."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if match := re.search(pattern, self.text):
                return match
            if self.process.poll() is not None:
                self.reader.join(5)  # what it said last
                if not re.search(pattern, self.text):
                    break
            time.sleep(0.02)
        raise AssertionError(
            f"no {pattern!r} in the log (exit code {self.process.poll()}):\n{self.text[-20_000:]}"
        )

    def wait_ready(self) -> None:
        self.wait_for(r"gemma-demo: ready")

    def end(self, seconds: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(seconds)

    def wait(self, seconds: float = 60) -> int:
        """The exit code; the process is killed when it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.reader.join()  # ends with the last process that holds the pipe: none may be left
            if self.process.stderr is not None:
                self.process.stderr.close()


def start_server(
    *arguments: str, environ: dict[str, str] | None = None, folder: Path = ROOT
) -> ServerProcess:
    """A server on a free port, as an operator starts it. The caller ends it."""
    script = str(Path(sys.executable).with_name("gemma-server"))
    server = start(script, "serve", "--port", "0", *arguments, environ=environ, folder=folder)
    server.url = server.wait_for(r"Listening on (http://[\w.:]+)")[1]
    return server


def start_fake(environ: dict[str, str] | None = None, **settings: dict[str, Any]) -> ServerProcess:
    """Our server around a fake engine on a free port: where the engine is not the subject."""
    settings["server"] = {"port": 0} | settings.get("server", {})
    server = start("-m", "tests.fake_server", json.dumps(settings), environ=environ)
    server.url = server.wait_for(r"Listening on (http://[\w.:]+)")[1]
    return server


def start(*arguments: str, environ: dict[str, str] | None = None, folder: Path = ROOT) -> ServerProcess:
    """This Python with `arguments`, its stderr read."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=clean_environ() | (environ or {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return ServerProcess(process)


def clean_environ() -> dict[str, str]:
    """This environment without settings of ours, which would change what the tests see."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GEMMA_")}


ALICE, SCRAPER = "sk-alice-0123456789abcdef", "sk-scraper-0123456789abcdef"
"""Keys of the live server, which may use them and need not: one that has a limit, and Prometheus's."""


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The real server with the real engine and the embedded model, shared by the whole session."""
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    alice = KeyEntry(name="alice", sha256=digest_of(ALICE).hex(), limits=KeyLimits(requests_per_minute=2))
    scraper = KeyEntry(name="prometheus", sha256=digest_of(SCRAPER).hex(), scopes=("metrics",))
    write_keys(keys, [alice, scraper])
    given = {
        "model.aliases": "gpt-4o-mini",
        "security.api_keys_file": keys,
        "security.api_key_required": "false",
        "log.stats_interval_seconds": 1,
    }
    options = [f"--set={name}={value}" for name, value in given.items()]
    server = start_server("--config", "demo", *options)
    try:
        server.wait_ready()
        yield server
    finally:
        code = server.end()
    assert code == 0, server.text[-5000:]


@pytest.fixture
def client(live: ServerProcess) -> Iterator[openai.OpenAI]:
    """The real OpenAI client, which refuses any answer that differs from OpenAI's schema."""
    with openai.OpenAI(
        base_url=f"{live.url}/v1",
        api_key="unused",
        max_retries=0,
        timeout=120,
        _strict_response_validation=True,
    ) as client:
        yield client


@pytest.fixture
def http(live: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=120) as client:
        yield client


@pytest.fixture
def no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No client may make the server log an error."""
    caplog.set_level(logging.INFO, "gemma_serve")
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.fixture(autouse=True)
def no_minute_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of a test: windows in memory begin with the clock's, and some of the last one's requests
    would count no more."""
    started = time.monotonic()

    def now() -> float:
        return 1_800_000_000 + time.monotonic() - started

    monkeypatch.setattr(window, "MemoryWindows", functools.partial(window.MemoryWindows, now=now))


@asynccontextmanager
async def serving(app: FastAPI, grace: int = 5, limits: ServerSettings | None = None) -> AsyncIterator[str]:
    """The app under a real uvicorn on a free port of this event loop; yields its URL."""
    config = uvicorn.Config(
        app,
        port=0,
        log_config=None,
        **protocols(limits or ServerSettings()),
        lifespan="on",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=grace,
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(10):
            while not server.started:
                await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real Redis of this session's own, in memory only."""
    with running_redis(tmp_path_factory.mktemp("redis") / "socket") as url:
        yield url


@contextmanager
def running_redis(path: Path) -> Iterator[str]:
    """Debian's redis-server at a socket."""
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--dir", str(path.parent)]
    process = subprocess.Popen([*command, "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        with redis.Redis(unix_socket_path=str(path)) as client:
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert process.poll() is None and time.monotonic() < deadline, (
                        "redis-server does not start"
                    )
                    time.sleep(0.01)
        yield f"unix://{path}"
    finally:
        process.terminate()
        process.wait(30)


@dataclass
class ForgetfulRedis:
    """Redis behind a relay that can lose what a script answers, and the connection with it."""

    url: str
    _losing: bool = False

    @asynccontextmanager
    async def loses_an_answer(self) -> AsyncIterator[None]:
        self._losing = True
        yield
        assert not self._losing, "nothing was asked"

    def loses(self, question: bytes, answer: bytes) -> bool:
        lost = self._losing and b"EVALSHA" in question and not answer.startswith(b"-")  # no such script yet
        self._losing = self._losing and not lost
        return lost


@asynccontextmanager
async def forgetful_redis(folder: Path) -> AsyncIterator[ForgetfulRedis]:
    redis = ForgetfulRedis(f"unix://{folder}/relay")

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(folder / "socket")
        while question := await reader.read(65536):
            back.write(question)
            answer = await there.read(65536)
            if redis.loses(question, answer):
                break
            writer.write(answer)
        back.close()
        writer.close()

    with running_redis(folder / "socket"):
        async with await asyncio.start_unix_server(relay, folder / "relay"):
            yield redis


@dataclass
class InProcess:
    """A server in this event loop, so that a test can look into its engine."""

    engine: VLLMEngine
    url: str
    admission: Admission

    def scheduler_stats(self) -> Any:
        """What vLLM's scheduler said after its last step."""
        assert self.engine._core is not None
        (stats,) = self.engine._core.scheduler_stats.values()
        return stats

    def unfinished(self) -> int:
        """Requests that vLLM still works on."""
        assert self.engine._llm is not None
        return int(self.engine._llm.get_num_unfinished_requests())


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def in_process() -> AsyncIterator[InProcess]:
    settings = Settings(
        model={"name": "gemma-demo", "max_length": 1024},
        engine={"enforce_eager": True, "enable_prefix_caching": False, "kv_cache_memory_bytes": 100_000_000},
    )
    engine = VLLMEngine(settings)
    app = create_app(settings, engine)
    async with serving(app) as url:
        await until(lambda: engine.status.ready or engine.status.failed, START_SECONDS)
        assert engine.status.ready, engine.status.error
        yield InProcess(engine, url, app.state.admission)


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for what must become true, not for a time."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)

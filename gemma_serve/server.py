"""Runs the application under uvicorn: what it prints, how it ends and with which exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time

import uvicorn

from . import logs
from .app import create_app
from .engine.base import Engine, EngineState
from .engine.lifecycle import VLLMEngine
from .errors import StartupError
from .settings import Settings

logger = logging.getLogger(__name__)


def run(settings: Settings) -> int:
    """Serve until a signal or a dead engine ends it. Returns the process's exit code."""
    logs.configure(settings.log.level, settings.log.format)
    sock = _bind(settings.server.host, settings.server.port)
    engine = VLLMEngine(settings)
    failures: list[str] = []
    config = uvicorn.Config(
        create_app(settings, engine, on_failure=lambda reason: _fail(reason, failures, server)),
        http="httptools",
        ws="websockets-sansio",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # whoever connects could name any address
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.server.shutdown_timeout_seconds)),
        lifespan="on",
    )
    server = uvicorn.Server(config)
    url = _url(sock)
    logger.info("Listening on %s; loading %s", url, settings.model.name)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(server, sock, engine, url, settings))
    sys.stdout.flush()
    if failures:
        # vLLM's loader thread may still be inside C code, which a normal exit would wait for or crash in.
        logging.shutdown()
        os._exit(1)
    if not server.started:
        return 1
    return 0


def _fail(reason: str, failures: list[str], server: uvicorn.Server) -> None:
    logger.critical("%s", reason)
    failures.append(reason)
    server.should_exit = True


async def _serve(
    server: uvicorn.Server, sock: socket.socket, engine: Engine, url: str, settings: Settings
) -> None:
    greeting = asyncio.create_task(_greet_when_ready(engine, url, settings))
    try:
        await server.serve(sockets=[sock])
    finally:
        greeting.cancel()


async def _greet_when_ready(engine: Engine, url: str, settings: Settings) -> None:
    started = time.monotonic()
    while engine.status.state is EngineState.LOADING:
        await asyncio.sleep(0.1)
    if engine.status.ready:
        print(_greeting(url, settings.model.id, time.monotonic() - started), flush=True)


def _greeting(url: str, model: str, seconds: float) -> str:
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}], "max_tokens": 32}}'
    return f"""
{model} is ready after {seconds:.0f} s.

  API    {url}/v1
  Docs   {url}/docs
  Try    curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'

Ctrl-C ends it.
"""


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is known before a model is loaded. Raises `StartupError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.set_inheritable(False)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error.strerror}. "
            "Set GEMMA_SERVER_HOST and GEMMA_SERVER_PORT, or stop what uses the port (`ss -ltnp` names it)."
        ) from error
    return sock


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


def refuse_workers() -> None:
    """Under `uvicorn --workers N` each worker would load an engine of its own: end uvicorn with a sentence."""
    workers = os.environ.get("WEB_CONCURRENCY", "1")
    for option, value in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        if option == "--workers":
            workers = value
        elif option.startswith("--workers="):
            workers = option.partition("=")[2]
    if workers.isdigit() and int(workers) > 1:
        print(
            f"gemma_serve: {workers} workers would load {workers} engines. Run one worker, and more replicas "
            "behind a load balancer.",
            file=sys.stderr,
            flush=True,
        )
        # uvicorn starts a dead worker again for ever, so its parent process has to end.
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(1)

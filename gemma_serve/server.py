"""Runs the application under uvicorn: what it prints, how it ends and with which exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

import uvicorn

from . import logs
from .app import create_app
from .drain import Drain
from .engine.base import Engine, EngineStatus
from .errors import StartupError
from .protocols import protocols
from .settings import ServerSettings, Settings

logger = logging.getLogger(__name__)

_FORCED_SECONDS = 3
_CANCEL_SECONDS = 1
"""How long a cancelled request may take to tell its client."""
_OTHER_FILES = 512
"""Besides connections: the engine's sockets and pipes, Redis, images that are fetched."""
_LISTENERS = 8
"""Descriptors of the one listening socket. libuv accepts one connection from each in a round of the loop, and
a round in which requests begin takes milliseconds: of hundreds that come together the last would wait."""


def run(settings: Settings, engine: Engine | None = None) -> NoReturn:
    """Serve until a signal or a dead engine ends it, then end the process: 0, or 1 for a failure."""
    logs.configure(settings.log.level, settings.log.format)
    _allow_files(settings.server.max_connections)
    sock = _bind(settings.server.host, settings.server.port)
    url = _url(sock, "https" if settings.server.tls_certificate else "http")
    started = time.monotonic()
    greeted = failed = False

    def on_change(status: EngineStatus) -> None:
        nonlocal greeted, failed
        failed = failed or status.failed
        if status.ready and not greeted:
            greeted = True
            with contextlib.suppress(OSError):  # nobody reads it, which is no reason to end
                print(_greeting(url, settings.model.id, time.monotonic() - started), flush=True)
        elif status.failed:
            server.should_exit = True

    drain = Drain()
    config = uvicorn.Config(
        create_app(settings, engine, drain=drain, on_change=on_change),
        **protocols(settings.server),
        ssl_certfile=settings.server.tls_certificate,
        ssl_keyfile=settings.server.tls_private_key,
        log_config=None,
        access_log=False,
        proxy_headers=False,  # whoever connects could name any address
        server_header=False,
        timeout_graceful_shutdown=_CANCEL_SECONDS,  # what has not ended by then was waited for in `Server`
        lifespan="on",
    )
    try:
        config.load()  # reads the certificate
    except (OSError, ValueError) as error:
        raise StartupError(f"the TLS certificate or key cannot be used: {error}") from error
    server = Server(config, drain, settings.server)
    logger.info("Listening on %s; loading %s", url, settings.model.name)
    try:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(server.serve(sockets=[sock, *(sock.dup() for _ in range(_LISTENERS - 1))]))
    except KeyboardInterrupt:
        pass  # before uvicorn listened to signals
    code = 1 if failed or not server.started else 0
    # A loader thread may still be inside vLLM's C code; a normal exit would wait for it or crash in it.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


class Server(uvicorn.Server):
    """Drains before it shuts down; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, drain: Drain, settings: ServerSettings) -> None:
        super().__init__(config)
        self._drain = drain
        self._settings = settings
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit and not self.lifespan.shutdown_event.is_set():
            # uvicorn would leave the application to be cancelled, with a traceback.
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._drain.begun:
            self.should_exit = self.force_exit = True
            # The engine may take long to end in good order; it ends by itself when this process has gone.
            end = threading.Timer(_FORCED_SECONDS, os._exit, (0,))
            end.daemon = True
            end.start()
            return
        # Whoever presses Ctrl-C has no load balancer that would have to hear of it first.
        delay = 0 if sig == signal.SIGINT else self._settings.drain_delay_seconds
        self._drain.begun = True
        self._loop.call_soon_threadsafe(self._start_draining, delay)

    def _start_draining(self, delay: float) -> None:
        self._draining = asyncio.create_task(self._drain_and_exit(delay))

    async def _drain_and_exit(self, delay: float) -> None:
        timeout = self._settings.shutdown_timeout_seconds
        logger.info("Shutting down: new requests for %g s, running ones for %g s more", delay, timeout)
        if not await self._drain.run(delay, timeout):
            logger.warning("%d requests did not end in %g s", self._drain.active, timeout)
        self.should_exit = True


def _greeting(url: str, model: str, seconds: float) -> str:
    message = '{"role": "user", "content": "Hello!"}'
    body = f'{{"model": "{model}", "messages": [{message}], "max_tokens": 32}}'
    return f"""
{model} is ready after {seconds:.0f} s.

  API    {url}/v1
  Docs   {url}/docs
  Chat   gemma-server chat {url}
  Try    curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'

Ctrl-C ends it.
"""


def _allow_files(connections: int) -> None:
    """Each connection is a file; the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        logger.warning(
            "The system lets this process have %d open files, too few for %d connections (ulimit -Hn)",
            allowed,
            connections,
        )


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port shows before a model is loaded. Raises `StartupError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
        sock.set_inheritable(False)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error.strerror}. "
            "Set GEMMA_SERVER_HOST and GEMMA_SERVER_PORT, or stop what uses the port (`ss -ltnp` names it)."
        ) from error
    return sock


def _url(sock: socket.socket, scheme: str) -> str:
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{host}:{port}"


def refuse_workers() -> None:
    """Under `uvicorn --workers N` each worker would load an engine: end uvicorn with a sentence."""
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

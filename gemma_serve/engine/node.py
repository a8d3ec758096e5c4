"""One node's share of an engine that spans several: vLLM's workers, driven by the server on another node.

The leader's workers meet those of the other nodes at `engine.master_addr`, `engine.master_port`. That port
opens when the leader's engine starts and closes when it dies, so a connection to it says whether there is an
engine to be part of: when it breaks, the workers here are ended, and this process waits for the next engine.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from .. import logs
from ..errors import StartupError
from ..settings import Settings
from . import environment
from .load_errors import sentence
from .processes import end_children

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5
_CONNECT_SECONDS = 5
_NOTICE_SECONDS = 5
"""A worker may notice that the leader has gone before the connection breaks."""


class Node:
    def __init__(self, settings: Settings) -> None:
        engine = settings.engine
        nodes, self._rank = int(engine.get("nnodes", 1)), int(engine.get("node_rank", 0))
        if not 0 < self._rank < nodes:
            raise StartupError(
                f"engine.nnodes = {nodes} and engine.node_rank = {self._rank}: a node has a rank from 1 to "
                "nnodes - 1; rank 0 is the leader's, which is `gemma-server serve`"
            )
        if not engine.get("master_addr"):
            raise StartupError("engine.master_addr: name the leader's host")
        self._settings = settings
        self._leader = (str(engine["master_addr"]), int(engine.get("master_port", 29501)))
        self._leaving = False
        self._lost = threading.Event()
        self._ending = threading.Lock()

    def run(self) -> NoReturn:
        """Work until a signal; end the process with 0, or raise `StartupError`."""
        logs.configure(self._settings.log.level, self._settings.log.format)
        signal.signal(signal.SIGTERM, self._leave)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            config = self._prepare()
            lease = self._wait_for_leader()
            threading.Thread(target=self._watch, args=(lease,), name="watch-leader", daemon=True).start()
            self._work(config)
        except KeyboardInterrupt:
            self._end()
        self._again("one of this node's workers has ended")

    def _leave(self, signum: int, frame: FrameType | None) -> None:
        """The leader drains when it is told to end; until it has gone, it needs this node."""
        self._leaving = True
        server = self._settings.server
        seconds = server.drain_delay_seconds + server.shutdown_timeout_seconds
        logger.info("Shutting down: staying until the leader has gone, %g s at most", seconds)
        timer = threading.Timer(seconds, self._end)
        timer.daemon = True
        timer.start()

    def _wait_for_leader(self) -> socket.socket:
        logger.info("Node %d waits for an engine at %s:%d", self._rank, *self._leader)
        while not self._leaving:
            try:
                lease = socket.create_connection(self._leader, timeout=_CONNECT_SECONDS)
            except OSError:
                time.sleep(_RETRY_SECONDS)
            else:
                lease.settimeout(None)
                lease.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                return lease
        self._end()

    def _watch(self, lease: socket.socket) -> None:
        try:
            while lease.recv(1024):
                pass
        except OSError:
            pass
        self._lost.set()
        self._again("the leader's engine has ended")

    def _prepare(self) -> VllmConfig:
        """What needs no leader, and takes longest: importing vLLM."""
        environment.prepare(self._settings)
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.usage.usage_lib import UsageContext

            from .arguments import engine_arguments

            arguments = AsyncEngineArgs(**engine_arguments(self._settings))
            return arguments.create_engine_config(UsageContext.OPENAI_API_SERVER, headless=True)
        except Exception as error:
            raise StartupError(sentence(error, self._settings.model.name)) from error

    def _work(self, config: VllmConfig) -> None:
        """Load this node's share and work on it; returns when a worker has ended."""
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        try:
            executor = MultiprocExecutor(config, monitor_workers=False)
        except Exception as error:
            if self._lost.wait(_NOTICE_SECONDS):
                threading.Event().wait()  # `_watch` ends or replaces this process
            raise StartupError(sentence(error, self._settings.model.name)) from error
        logger.info("Node %d works", self._rank)
        executor.start_worker_monitor(inline=True)

    def _again(self, reason: str) -> NoReturn:
        """Start this program anew, in the same process: vLLM cannot be taken down and built up within one."""
        if self._leaving:
            self._end()
        self._only_once()
        logger.warning("%s; this node joins the next engine", reason.capitalize())
        end_children()
        logging.shutdown()
        if self._leaving:
            os._exit(0)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    def _end(self) -> NoReturn:
        self._only_once()
        end_children()
        logging.shutdown()
        os._exit(0)

    def _only_once(self) -> None:
        """The first thread that ends this program does so; others wait for that."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()

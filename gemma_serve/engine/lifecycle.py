"""`VLLMEngine`: loads vLLM in the background while the server already answers, keeps it alive, takes it down.

When the engine dies or hangs, another one is started in its place, and requests go on (see `core.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from .. import logs
from ..errors import EngineDied, ServeError, StartupError
from ..periodic import every
from ..settings import Settings
from . import environment, vllm_import
from .base import (
    EngineReport,
    EngineState,
    EngineStatus,
    GenerationRequest,
    GpuMemory,
    LoadedModel,
    RelayKind,
    TokenStream,
    Usage,
)
from .leftovers import forget_models
from .load_errors import sentence
from .load_progress import Progress
from .process_output import EngineOutput, formatted_stderr, killed_core
from .processes import Footprint, end_children
from .restarts import Restarts
from .sleep import ANSWER_SECONDS, Sleep

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient

    from .core import ReplaceableCore
    from .vllm_engine import EngineBuilder, VLLMServing

logger = logging.getLogger(__name__)
T = TypeVar("T")

_WATCH_SECONDS = 0.5
_LOADER_SECONDS = 15
_KILLED_SECONDS = 30
_SHORTEST_RESTART, _RESTART_BY_LOAD = 600, 5
"""Seconds that a restart may take at least, and by how much more than the load, which may have downloaded."""
_SOCKET_NAME, _LONGEST_SOCKET_PATH = 37, 107  # a slash and a UUID; sun_path of unix(7)


_WITHOUT_A_WORD = (
    "one of the engine's processes ended without a word, as when the kernel kills it: is the machine, or the "
    "container, short of memory?"
)


class VLLMEngine:
    """The real engine; see `base.Engine`."""

    def __init__(self, settings: Settings) -> None:
        self.status = EngineStatus()
        self._settings = settings
        self._builder: EngineBuilder | None = None
        self._llm: AsyncLLM | None = None
        self._core: ReplaceableCore | None = None
        self._serving: VLLMServing | None = None
        self._loaded: LoadedModel | None = None
        self._footprint: Footprint | None = None
        self._output: EngineOutput | None = None
        self._load_seconds = 0.0
        self._sleep = Sleep(self.status, self._restart, self._background)
        self._restarts = Restarts(settings.supervisor)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loader: threading.Thread | None = None
        self._share: float | None = None
        self._spawning = False
        self._sockets: str | None = None
        self._variables: set[str] = set()
        self._stopping = False

    async def start(self) -> None:
        self._background(self._load_and_watch())

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Nobody watches over the engine any more: say so and end, rather than let requests wait for ever.
            logger.critical("The engine's supervision failed", exc_info=error)
            if self._core is not None:
                self._core.give_up()
            self.status.set(EngineState.DEAD, error=f"its supervision failed: {error!r}")

    async def _load_and_watch(self) -> None:
        output: EngineOutput | None = None
        started = time.monotonic()
        try:
            with formatted_stderr(self._progressed) as output:
                self._prepare()
                await self._in_daemon_thread(_import_vllm)
                llm = await self._in_daemon_thread(self._load)
            self._output, self._load_seconds = output, time.monotonic() - started
            from .core import ReplaceableCore
            from .vllm_engine import serve

            self._phase("warming up")
            self._core = ReplaceableCore(llm.engine_core, llm.output_processor, self._on_death)
            llm.engine_core = self._core
            async with every(_WATCH_SECONDS, self._notice_death):
                serving = await _within(
                    ANSWER_SECONDS, serve(self._settings, llm, self.status), "answer, to warm up,"
                )
            self._footprint = await asyncio.to_thread(Footprint)
            self._loaded = await asyncio.to_thread(serving.describe, self._settings)
            if self._core.resources.engine_dead:
                raise EngineDied("the engine's process ended while it warmed up; its log has the root cause")
            self._serving = serving
        except Exception as error:
            logger.debug("The engine failed to start", exc_info=True)
            self.status.set(EngineState.FAILED, error=await self._reason(error, output))
            return
        self.status.set(EngineState.READY)
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            self._core.notice_death()
            self._notice_stall(self._core)

    async def _notice_death(self) -> None:
        assert self._core is not None
        self._core.notice_death()

    def _prepare(self) -> None:
        self._phase("importing vLLM")
        self._variables = environment.prepare(self._settings)
        environment.send_traces(self._settings.otel)
        self._sockets = tempfile.mkdtemp(prefix="gemma-serve-")
        if len(self._sockets) + _SOCKET_NAME <= _LONGEST_SOCKET_PATH:
            # vLLM leaves its sockets behind; `stop` does not
            os.environ["VLLM_RPC_BASE_PATH"] = self._sockets
            self._variables.add("VLLM_RPC_BASE_PATH")

    def _load(self) -> AsyncLLM:
        from .vllm_engine import EngineBuilder

        self._builder = EngineBuilder(self._settings, self._phase)
        self._spawning = True
        self._phase("starting the engine and loading the weights")
        self._llm = self._builder.llm()
        return self._llm

    async def _reason(self, error: Exception, output: EngineOutput | None) -> str:
        cause: object = error
        if "root cause" in str(error) and output is not None:
            await asyncio.to_thread(output.ended.wait, 2)  # its last lines say what happened
            otherwise = error if isinstance(error, ServeError) else _WITHOUT_A_WORD
            cause = killed_core(str(error)) or output.root_cause() or otherwise
        return sentence(cause, self._settings.model.name)

    def _phase(self, phase: str) -> None:
        if self._stopping:
            raise StartupError("stopped while loading")
        self._share = None
        self.status.set(EngineState.LOADING, phase)

    def _progressed(self, progress: Progress) -> None:
        if self._llm is None and self.status.state is EngineState.LOADING and not self._stopping:
            self._share = progress.share
            if progress.phase != self.status.phase:
                self.status.set(EngineState.LOADING, progress.phase)

    def _notice_stall(self, core: ReplaceableCore) -> None:
        health = self._settings.health
        silent = core.silent_seconds()
        if self.status.state is EngineState.READY and silent > health.stall_seconds:
            self.status.set(
                EngineState.STALLED,
                error=f"no step finished for {silent:.0f} s, with {core.unfinished} requests at work",
            )
        elif self.status.state is EngineState.STALLED and silent <= health.stall_seconds:
            self.status.set(EngineState.READY)
        footprint = self._footprint
        if silent > health.stall_restart_seconds and footprint is not None and not footprint.killed:
            logger.error("The engine has hung for %.0f s: it is killed and started again", silent)
            footprint.kill()
        elif silent > health.stall_restart_seconds + _KILLED_SECONDS and not self.status.failed:
            core.give_up()
            self.status.set(EngineState.DEAD, error="the engine hangs and cannot be killed")

    def _on_death(self) -> None:
        if self._serving is None:  # nobody has been promised anything yet: the load has failed
            assert self._core is not None
            self._core.give_up()
        elif not (self._sleep.died() or self._stopping):
            self._background(self._restart())

    async def _restart(self) -> None:
        """Put another core in the place of the dead one."""
        assert self._core is not None and self._builder is not None and self._llm is not None
        self._core.died(
            hung=self._footprint is not None and self._footprint.killed,
            killed=self._output is not None and self._output.worker_killed,
        )
        await self._llm.renderer.clear_mm_cache_async()  # it counts on images that the dead engine had
        reason = "the engine's process ended unexpectedly"
        while (wait := self._restarts.next_wait()) is not None:
            self.status.set(EngineState.RESTARTING, f"{self._core.unfinished} requests wait", reason)
            output: EngineOutput | None = None
            try:
                if self._footprint is not None:
                    await asyncio.to_thread(self._footprint.remove)
                # vLLM does it where the engine could not say that it dies: its sockets and their threads go.
                await asyncio.to_thread(self._core.shutdown, 0)
                await asyncio.sleep(wait)
                with formatted_stderr() as output:
                    core = await self._start_core(self._builder)
                self._output, self._footprint = output, await asyncio.to_thread(Footprint)
            except Exception as error:
                logger.debug("The engine failed to start again", exc_info=True)
                await asyncio.to_thread(end_children)
                reason = await self._reason(error, output)
                continue
            if await self._core.replace(core):
                self._restarts.succeeded()
                self.status.set(EngineState.READY)
            return
        self._core.give_up()
        self.status.set(EngineState.DEAD, error=f"{reason}; {self._restarts.spent()}")

    async def _start_core(self, builder: EngineBuilder) -> AsyncMPClient:
        seconds = max(_SHORTEST_RESTART, _RESTART_BY_LOAD * self._load_seconds)
        return await _within(seconds, self._in_daemon_thread(builder.core), "start")

    async def stop(self) -> None:
        self._stopping = True
        try:
            for task in list(self._tasks):
                await _cancel(task)
            if not self.status.failed:
                self.status.set(EngineState.STOPPED)
            if self._core is not None:  # whoever waits for its output would wait for ever
                self._core.abandon(EngineDied("The engine was stopped before this request had ended."))
            if self._llm is not None and self._llm.output_handler is not None:
                # It would take the end of the engine's process for a crash.
                await _cancel(self._llm.output_handler)
        finally:
            await asyncio.to_thread(self._end)

    async def check(self) -> None:
        def arguments() -> None:
            from .arguments import engine_arguments

            try:
                engine_arguments(self._settings)
            except Exception as error:
                raise StartupError(sentence(error, self._settings.model.name)) from error

        await asyncio.to_thread(arguments)

    def abandon(self, error: ServeError) -> None:
        self.status.set(EngineState.UNLOADED)
        if self._core is not None:
            self._core.abandon(error)

    def require_sleep(self) -> None:
        self._sleep.require(self._llm)

    async def sleep(self, level: int) -> None:
        self.require_sleep()
        assert self._llm is not None
        await self._sleep.begin(self._llm, level)

    async def wake(self) -> None:
        assert self._llm is not None
        await self._sleep.end(self._llm)

    async def load_adapter(self, name: str, path: str) -> LoadedModel:
        serving = self._ready()
        assert self._loaded is not None
        return await serving.adapters.load(name, path, self._loaded)

    async def unload_adapter(self, name: str) -> None:
        await self._ready().adapters.unload(name)

    def _end(self) -> None:
        if self._llm is not None:
            self._llm.shutdown(timeout=5)
        end_children()
        # A loader that was about to start a process has started it by now; without it the loader ends soon.
        deadline = time.monotonic() + _LOADER_SECONDS
        while self._spawning and self._loader is not None and self._loader.is_alive():
            if time.monotonic() > deadline:
                break
            self._loader.join(0.2)
            end_children()
        if self._footprint is not None:
            self._footprint.remove()
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
        for name in self._variables:  # the next model is to have its own
            os.environ.pop(name, None)
        forget_models()

    async def _in_daemon_thread(self, work: Callable[[], T]) -> T:
        """As `asyncio.to_thread`, but the end of the process does not wait for `work`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(setter: Callable[[Any], None], value: Any) -> None:
            if not future.done():
                setter(value)

        def run() -> None:
            outcome: tuple[Callable[[Any], None], Any]
            try:
                outcome = (future.set_result, work())
            except BaseException as error:
                outcome = (future.set_exception, error)
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                loop.call_soon_threadsafe(settle, *outcome)

        self._loader = threading.Thread(target=run, name="engine-loader", daemon=True)
        self._loader.start()
        return await future

    async def complete(self, request: GenerationRequest) -> tuple[dict[str, Any], Usage]:
        return await self._ready().complete(request)

    async def stream(self, request: GenerationRequest) -> TokenStream:
        return await self._ready().stream(request)

    async def relay(
        self, kind: RelayKind, body: dict[str, Any]
    ) -> dict[str, Any] | AsyncGenerator[bytes, None]:
        return await self._ready().relay.call(kind, body)

    def _ready(self) -> VLLMServing:
        self.status.require_serving()
        assert self._serving is not None
        return self._serving

    def loaded(self) -> LoadedModel | None:
        return self._loaded

    def capacity(self) -> int:
        if self._llm is None:
            return 1
        config = self._llm.vllm_config
        engines = len(self._llm.engine_core.engine_ranks_managed)  # data parallel ones
        sequences = int(config.scheduler_config.max_num_seqs) * engines
        return sequences + max(
            4, sequences // 8
        )  # a few wait in the engine, so that no step has a free place

    def model_length(self) -> int | None:
        return None if self._llm is None else int(self._llm.model_config.max_model_len)

    def report(self) -> EngineReport:
        if self._llm is None or self._core is None:
            return EngineReport(loaded=self._share)
        from .report import report

        return report(self._llm, self._core, self._footprint)

    def gpu_memory(self) -> list[GpuMemory]:
        if self._llm is None:
            return []
        from .report import gpu_memory

        return gpu_memory(self._llm)


def _import_vllm() -> None:
    """In a thread of its own: packages keep errors that they caught, and these the frames of who imports."""
    vllm_import.begin()
    try:
        from . import vllm_engine  # noqa: F401
    except ImportError as error:
        raise StartupError(
            f"vLLM cannot be imported ({error}): run `make setup`, which installs it for this machine"
        ) from error
    finally:
        vllm_import.end()
    logs.adopt("torch")


async def _cancel(task: asyncio.Task[None]) -> None:
    """Wait for its end, and take the error out of it, which keeps all that was at work."""
    task.cancel()
    await asyncio.wait((task,))
    with contextlib.suppress(asyncio.CancelledError, Exception):
        task.result()


async def _within(seconds: float, work: Coroutine[Any, Any, T], doing: str) -> T:
    """Raises `StartupError` when it takes longer."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await work
    except TimeoutError:
        if not limit.expired():
            raise  # of the work itself
        raise StartupError(f"the engine did not {doing} within {seconds:.0f} s") from None

"""`EngineSwitch`: the engine that runs now, and another model's in its place.

Each model gets an engine of its own, which is stopped, processes and all, before the next one starts: what a
model leaves behind goes with it. Two at once would not fit into a device's memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ..errors import ServeError, StartupError
from ..garbage import search_everywhere
from ..settings import Settings
from .base import (
    Engine,
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


class EngineSwitch:
    """An `Engine` to who sends it requests. To change models: `hold`, `end`, then `run` or `rest`.

    `status` is what the running engine says of itself, except while models change: then it is loading.
    """

    def __init__(self, settings: Settings, make: Callable[[Settings], Engine]) -> None:
        self.status = EngineStatus()
        self.settings: Settings | None = settings
        """Of the model that runs, or that is being loaded."""
        self._make = make
        self._engine: Engine | None = make(settings)
        self._ending: asyncio.Task[None] | None = None
        self._resumed_before = 0
        self._follow(self._engine)
        now = self._engine.status
        # One that was given may have begun.
        if (now.state, now.phase) != (self.status.state, self.status.phase):
            self.status.set(now.state, now.phase, now.error)

    def _follow(self, engine: Engine) -> None:
        def say(status: EngineStatus) -> None:
            self.status.set(status.state, status.phase, status.error)

        engine.status.on_change = say

    @property
    def model(self) -> str | None:
        """The served name of the model that runs, or that is being loaded."""
        return None if self.settings is None else self.settings.model.id

    async def start(self) -> None:
        await self._running().start()

    async def stop(self) -> None:
        if self._ending is not None:
            await asyncio.shield(self._ending)
        if self._engine is not None:
            await self._engine.stop()
        if not self.status.failed and self.status.state is not EngineState.STOPPED:
            self.status.set(EngineState.STOPPED)

    # Changing models.

    async def check_model(self, settings: Settings) -> None:
        """As `Engine.check`, of a model that does not run. Raises `StartupError`."""
        await self._make(settings).check()

    def hold(self, phase: str) -> None:
        """Take no further requests; those under way go on."""
        if self._engine is not None:
            self._engine.status.on_change = lambda status: None
        self.status.set(EngineState.LOADING, phase)

    async def end(self) -> None:
        """Stop the engine that runs; its memory is free when this returns. Cancelling does not stop that."""
        if self._engine is None:
            return
        self._resumed_before = self.report().resumed
        engine, self._engine, self.settings = self._engine, None, None
        self._ending = asyncio.create_task(engine.stop())
        await asyncio.shield(self._ending)
        self._ending = None
        del engine
        search_everywhere()  # its parts know each other, and hold the tokenizer and buffers

    async def run(self, settings: Settings) -> None:
        """Start the model of `settings`; returns when it is ready. Raises `StartupError`."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        engine = self._make(settings)

        def say(status: EngineStatus) -> None:
            if status.state is EngineState.LOADING:
                self.status.set(EngineState.LOADING, status.phase)
            elif status.ready or status.failed:
                loop.call_soon_threadsafe(over.set)

        engine.status.on_change = say
        self._engine, self.settings = engine, settings
        self.status.set(EngineState.LOADING, "starting")
        await engine.start()
        await over.wait()
        if engine.status.failed:
            error = engine.status.error
            del engine  # what is raised keeps this frame
            await self.end()
            raise StartupError(error or "it could not be loaded")
        self.go_on()

    def go_on(self) -> None:
        """Say again what the running engine says of itself."""
        engine = self._running()
        self._follow(engine)
        status = engine.status
        self.status.set(status.state, status.phase, status.error)

    def rest(self, error: str | None = None) -> None:
        """Run nothing. `error` is why, where nobody asked for it."""
        self.status.set(EngineState.UNLOADED, error=error)

    def abandon(self, error: ServeError) -> None:
        if self._engine is not None:
            self._engine.abandon(error)

    def require_sleep(self) -> None:
        self._running().require_sleep()

    async def sleep(self, level: int) -> None:
        await self._running().sleep(level)
        self.status.set(EngineState.SLEEPING)

    async def wake(self) -> None:
        await self._running().wake()
        self.go_on()

    async def load_adapter(self, name: str, path: str) -> LoadedModel:
        return await self._running().load_adapter(name, path)

    async def unload_adapter(self, name: str) -> None:
        await self._running().unload_adapter(name)

    # What the running engine does.

    async def check(self) -> None:
        await self._running().check()

    async def complete(self, request: GenerationRequest) -> tuple[dict[str, Any], Usage]:
        return await self._running().complete(request)

    async def stream(self, request: GenerationRequest) -> TokenStream:
        return await self._running().stream(request)

    async def relay(
        self, kind: RelayKind, body: dict[str, Any]
    ) -> dict[str, Any] | AsyncGenerator[bytes, None]:
        return await self._running().relay(kind, body)

    def loaded(self) -> LoadedModel | None:
        return None if self._engine is None else self._engine.loaded()

    def capacity(self) -> int:
        return 1 if self._engine is None else self._engine.capacity()

    def model_length(self) -> int | None:
        return None if self._engine is None else self._engine.model_length()

    def report(self) -> EngineReport:
        if self._engine is None:
            return EngineReport(resumed=self._resumed_before)
        report = self._engine.report()
        if not self._resumed_before:
            return report
        return dataclasses.replace(report, resumed=report.resumed + self._resumed_before)

    def gpu_memory(self) -> list[GpuMemory]:
        engine = self._engine  # another thread may end it meanwhile
        return [] if engine is None else engine.gpu_memory()

    def _running(self) -> Engine:
        if self._engine is None:
            self.status.require_serving()
        assert self._engine is not None
        return self._engine

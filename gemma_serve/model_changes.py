"""Which of the configured models runs. One change at a time:

    load     check the other model's configuration, while this one still answers
             → hold: new requests wait or get 503, those under way finish, for a limited time
             → end this model's engine, processes and all → start the other's
             → should that fail, start this one again and say why
    unload   hold → end
    sleep    hold → vLLM gives the device's memory back and keeps its processes
    wake     the reverse

There is no state beside the engine's: what runs is what the switch runs, and whether it takes requests is its
status, which is loading while models change. A change goes on when the client that asked for it has left.
A LoRA adapter belongs to its model: it is there when that runs, and is loaded again with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

from .engine.base import EngineState
from .engine.switch import EngineSwitch
from .errors import Conflict, LoadFailed, ModelNotLoaded, NotImplementedHere, ServeError, StartupError
from .model_names import ModelNames
from .settings import LoadingSettings, Settings

logger = logging.getLogger(__name__)

LOADING_SECONDS = 30
"""When to come back while a model is loaded, which takes from seconds to minutes."""
_ABANDONED_SECONDS = 5.0

ChangeTask = asyncio.Task[None]


@dataclass(slots=True)
class Change:
    state: Literal["loading", "unloading"]
    """Of the model that it is about."""
    model: str


class ModelChanges:
    """Begins them, and knows what is at stake: the requests under way."""

    def __init__(self, settings: LoadingSettings, names: ModelNames, switch: EngineSwitch) -> None:
        self.change: Change | None = None
        self.errors: dict[str, str] = {}
        """Why the last load of a model or an adapter failed."""
        self._drain_seconds = settings.drain_seconds
        self._names = names
        self._switch = switch
        self._task: ChangeTask | None = None
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.on_end: Callable[[], None] = lambda: None

    @property
    def model(self) -> str | None:
        """The model that runs, or, once none takes requests any more, the one that is about to."""
        return self._switch.model if self.change is None or self._switch.status.serving else self.change.model

    def serves(self, served: str) -> bool:
        """Does it take requests?"""
        if not self._switch.status.serving or self._switch.model != self._names.base(served):
            return False
        adapter = self._names.adapters.get(served)
        return adapter is None or adapter.loaded is not None

    def error(self, served: str) -> str | None:
        return self.errors.get(served) or self.errors.get(self._names.base(served))

    def not_loaded(self, served: str) -> ModelNotLoaded:
        model, error = self._names.base(served), self.error(served)
        why = f" It could not be: {error}." if error else ""
        asleep = self._switch.model == model and self._switch.status.state is EngineState.SLEEPING
        return ModelNotLoaded(
            f"The model {served!r} is not loaded.{why} An operator can load it with "
            f"POST /v1/models/{model}/{'wake' if asleep else 'load'}.",
            retry_after=LOADING_SECONDS,
        )

    def enter(self) -> None:
        """A request has begun, which a change has to wait for."""
        self._active += 1
        self._idle.clear()

    def leave(self) -> None:
        self._active -= 1
        if not self._active:
            self._idle.set()

    # What an operator may ask for.

    def load(self, name: str) -> ChangeTask | None:
        """Begin to run the model in place of what runs; None when it does already.

        Awaited, the task raises `LoadFailed`. Raises `Conflict`, `ModelNotFound`, `NotImplementedHere`.
        """
        model = self._names.find_model(name)
        if self.change is None and self.serves(model):
            return None
        if self._switch.model == model and self._switch.status.state is EngineState.SLEEPING:
            return self.wake(model)
        if any(_spans_nodes(one) for one in (self._names.configured[model], self._switch.settings)):
            raise NotImplementedHere("An engine that spans nodes is not changed for another while it runs.")
        return self._begin("loading", model, lambda: self._load(model))

    def unload(self, name: str) -> ChangeTask | None:
        """Begin to end the model; None when it does not run. Raises as `load`."""
        model = self._names.find_model(name)
        if self.change is None and self._switch.model != model:
            return None
        return self._begin("unloading", model, self._unload)

    def sleep(self, name: str, level: int) -> ChangeTask | None:
        """Begin to put it to sleep, see `Engine.sleep`; None when it sleeps.

        Raises `ModelNotLoaded`, and as `load`.
        """
        model = self._names.find_model(name)
        if self.change is None:
            if self._switch.model != model:
                raise self.not_loaded(model)
            if self._switch.status.state is EngineState.SLEEPING:
                return None
            self._switch.require_sleep()
        return self._begin("unloading", model, lambda: self._sleep(level))

    def wake(self, name: str) -> ChangeTask | None:
        """Begin to wake it; None when it is awake. Raises as `sleep`."""
        model = self._names.find_model(name)
        if self.change is None:
            if self._switch.model != model:
                raise self.not_loaded(model)
            if self._switch.status.state is not EngineState.SLEEPING:
                return None
        return self._begin("loading", model, self._wake)

    async def stop(self) -> None:
        """End what runs, and a change that is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        await self._switch.stop()

    # How it is done.

    def _begin(
        self,
        state: Literal["loading", "unloading"],
        model: str,
        work: Callable[[], Coroutine[Any, Any, None]],
    ) -> ChangeTask:
        status = self._switch.status
        if self.change is not None or status.state is EngineState.LOADING:
            doing, about = "loading", self.model
            if self.change is not None:
                doing, about = self.change.state, self.change.model
            raise Conflict(f"The server is {doing} {about!r}: wait until that is done.", param="model")
        if status.failed or status.state is EngineState.STOPPED:
            status.require_serving()
        self.change = Change(state, model)
        self._task = asyncio.create_task(self._run(work()))
        self._task.add_done_callback(_note)
        return self._task

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except ServeError:
            raise
        except Exception as error:
            # Nobody knows what runs now: end, to be started anew, rather than let requests wait for ever.
            self._switch.status.set(EngineState.FAILED, error=f"a change of models failed: {error!r}")
            raise
        finally:
            self.change = None
            self.on_end()

    async def _load(self, model: str) -> None:
        settings, before = self._names.configured[model], self._switch.settings
        self.errors.pop(model, None)
        try:
            await self._switch.check_model(settings)
        except StartupError as error:
            raise self._failed(model, error) from error
        if before is not None:
            await self._end()
        try:
            await self._switch.run(settings)
        except StartupError as error:
            failure = self._failed(model, error)
            if before is None or before is settings:
                self._switch.rest(str(error))
            else:
                await self._go_back(before, failure)
            raise failure from error
        await self._load_adapters(model)

    async def _go_back(self, before: Settings, failure: LoadFailed) -> None:
        model = before.model.id
        logger.error("%s %s is loaded again.", failure, model)
        self.change = Change("loading", model)
        try:
            await self._switch.run(before)
        except StartupError as again:
            self._switch.status.set(EngineState.FAILED, error=f"{model} could not be loaded again: {again}")
        else:
            await self._load_adapters(model)

    def _failed(self, model: str, error: StartupError) -> LoadFailed:
        self.errors[model] = str(error)
        return LoadFailed(f"{model!r} could not be loaded: {error}.", param="model")

    async def _unload(self) -> None:
        await self._end()
        self._switch.rest()

    async def _sleep(self, level: int) -> None:
        await self._drain()
        try:
            await self._switch.sleep(level)
        except ServeError:
            self._switch.go_on()
            raise

    async def _wake(self) -> None:
        self._switch.hold("waking up")
        try:
            await self._switch.wake()
        except ServeError:
            self._switch.go_on()
            raise

    async def _end(self) -> None:
        await self._drain()
        for adapter in self._names.adapters.values():
            adapter.loaded = None
        await self._switch.end()

    async def _drain(self) -> None:
        """Take no requests, and wait until those under way have ended."""
        self._switch.hold(f"{self._active} requests of {self._switch.model} finish first")
        try:
            async with asyncio.timeout(self._drain_seconds):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests have not ended in time, and are ended", self._active)
            why = "The model was unloaded before this request had ended. Try again later."
            self._switch.abandon(ModelNotLoaded(why, retry_after=LOADING_SECONDS))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ABANDONED_SECONDS):
                    await self._idle.wait()

    async def _load_adapters(self, model: str) -> None:
        """Those that it had when it ran before. Who has just asked for another loads that."""
        adapters = [one for one in self._names.adapters.values() if one.model == model and not one.loading]
        for adapter in adapters:
            adapter.loading = True
        for adapter in adapters:
            try:
                adapter.loaded = await self._switch.load_adapter(adapter.name, adapter.path)
                self.errors.pop(adapter.name, None)
            except ServeError as error:
                self.errors[adapter.name] = error.message
                logger.error("The adapter %s of %s could not be loaded again: %s", adapter.name, model, error)
            finally:
                adapter.loading = False


def _spans_nodes(settings: Settings | None) -> bool:
    return settings is not None and settings.engine.get("nnodes", 1) != 1


def _note(task: ChangeTask) -> None:
    """Who asked for it may have left."""
    if not task.cancelled() and (error := task.exception()) is not None:
        level, trace = (logging.ERROR, None) if isinstance(error, ServeError) else (logging.CRITICAL, error)
        logger.log(level, "A change of models failed: %s", error, exc_info=trace)

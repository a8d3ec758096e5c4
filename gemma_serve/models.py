"""Which models are served, what they are called, and which of them runs.

One of the configured models runs at a time. `Models` is the gate that each request passes (`enter`, `leave`)
and the only one that changes models, one change at a time:

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
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

from .clients import current_client
from .engine.base import EngineState, LoadedModel
from .engine.switch import EngineSwitch
from .errors import (
    Conflict,
    EngineNotReady,
    LoadFailed,
    ModelNotFound,
    ModelNotLoaded,
    NotImplementedHere,
    Overloaded,
    PermissionDenied,
    ServeError,
    StartupError,
)
from .settings import Settings

logger = logging.getLogger(__name__)

_LOADING_SECONDS = 30  # when to come back while a model is loaded, which takes from seconds to minutes
_ABANDONED_SECONDS = 5.0


@dataclass(slots=True)
class _Change:
    state: Literal["loading", "unloading"]
    """Of the model that it is about."""
    model: str


@dataclass(slots=True)
class _Adapter:
    name: str
    path: str
    model: str
    """That it changes."""
    created: int
    loaded: LoadedModel | None
    """None while its model does not run."""


class Models:
    """The configured models and their adapters, by name and alias."""

    def __init__(self, settings: Settings, switch: EngineSwitch) -> None:
        self._configured = settings.of_models()
        self._loading = settings.loading
        self._most_waiting = settings.queue.max_requests
        self._switch = switch
        self._created = int(time.time())
        self._names = {name: id for id, one in self._configured.items() for name in (id, *one.model.aliases)}
        for id, one in self._configured.items():
            self._names.setdefault(one.model.name, id)
        self._adapters: dict[str, _Adapter] = {}
        self._errors: dict[str, str] = {}
        """Why the last load of a model failed."""
        self._change: _Change | None = None
        self._task: asyncio.Task[None] | None = None
        self._active = 0
        self._waiting = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._moved = asyncio.Event()

    # Names.

    def resolve(self, name: str | None) -> str:
        """The served name behind `name`, which may be an alias, or absent: then it is what runs.

        Raises `ModelNotFound`, and `PermissionDenied` where the client's key is not for it.
        """
        served = self.default if name is None else name if name in self._adapters else self._names.get(name)
        if served is None:
            known = ", ".join(map(repr, (*self._configured, *self._adapters)))
            raise ModelNotFound(
                f"The model {name!r:.100} does not exist; this server has {known}.", param="model"
            )
        if not self._allowed(served):
            raise PermissionDenied(
                f"This API key has no access to the model {served!r}.", param="model", code="model_not_found"
            )
        return served

    @property
    def default(self) -> str:
        """The model that answers who names none: the one that runs, or is about to, or the first."""
        if self._change is not None:
            return self._change.model
        return self._switch.model or next(iter(self._configured))

    def _base(self, served: str) -> str:
        adapter = self._adapters.get(served)
        return served if adapter is None else adapter.model

    def _allowed(self, served: str) -> bool:
        client = current_client.get()
        if client is None or not client.models:
            return True
        base = self._base(served)
        names = {served, *(name for name, id in self._names.items() if id == base)}
        return not client.models.isdisjoint(names)

    # What they are.

    def list(self) -> list[dict[str, Any]]:
        """OpenAI's model objects, with the fields of vLLM that clients read: those the client may use."""
        rows = [self._row(id) for id in self._configured if self._allowed(id)]
        return rows + [self._adapter_row(one) for one in self._adapters.values() if self._allowed(one.name)]

    def get(self, name: str) -> dict[str, Any]:
        """One of `list`, by name or alias. Raises `ModelNotFound`."""
        served = self.resolve(name)
        adapter = self._adapters.get(served)
        return self._row(served) if adapter is None else self._adapter_row(adapter)

    def context_length(self, name: str | None = None) -> int | None:
        """In tokens, once it is known; by default of the model that runs."""
        model = self._base(name or self.default)
        known = self._switch.model_length() if self._switch.model == model else None
        return known or self._configured[model].model.max_length

    def summary(self) -> dict[str, Any]:
        """Of the model that runs, or would answer."""
        model = self._configured[self.default].model
        return {
            "id": model.id,
            "name": model.name,
            "aliases": list(model.aliases),
            "max_model_len": self.context_length(),
        }

    def loaded(self, served: str) -> LoadedModel | None:
        """None where it is not loaded."""
        if (adapter := self._adapters.get(served)) is not None:
            return adapter.loaded
        return self._switch.loaded() if self._switch.model == served else None

    def _row(self, id: str) -> dict[str, Any]:
        model, loaded = self._configured[id].model, self.loaded(id)
        return {
            "id": id,
            "object": "model",
            "created": self._created,
            "owned_by": "google",
            "root": model.name,
            "parent": None,
            "max_model_len": self.context_length(id),
            "aliases": list(model.aliases),
            "family": loaded and loaded.family,
            "modalities": loaded and list(loaded.modalities),
            "state": self._state(id),
            "error": self._errors.get(id),
        }

    def _adapter_row(self, adapter: _Adapter) -> dict[str, Any]:
        state = self._state(adapter.model) if adapter.loaded else "unloaded"
        more = {"id": adapter.name, "root": adapter.path, "parent": adapter.model, "created": adapter.created}
        error = self._errors.get(adapter.name)
        return self._row(adapter.model) | more | {"aliases": [], "state": state, "error": error}

    def _state(self, id: str) -> str:
        change, status = self._change, self._switch.status
        if change is not None and change.model == id:
            return change.state
        if self._switch.model != id:
            return "unloaded"
        held = change is not None and status.state is EngineState.LOADING
        return "unloading" if held else str(status.state)

    # The gate.

    def require_open(self) -> None:
        """Raise `EngineNotReady` where no request at all could be served, whichever model it is for."""
        status = self._switch.status
        away = status.state in (EngineState.UNLOADED, EngineState.SLEEPING)
        if not away and not (status.state is EngineState.LOADING and self._loading.wait_seconds):
            status.require_serving()

    async def enter(self, served: str) -> None:
        """Wait until the model takes requests; `leave` when this one has ended.

        Raises `ModelNotLoaded`, `EngineNotReady`, `Overloaded`.
        """
        if not self._serves(served):
            await self._wait_for(served)
        self._active += 1
        self._idle.clear()

    def leave(self) -> None:
        self._active -= 1
        if not self._active:
            self._idle.set()

    def moved(self) -> None:
        """The engine's state has changed. To be called in the event loop."""
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _serves(self, served: str) -> bool:
        if not self._switch.status.serving or self._switch.model != self._base(served):
            return False
        return served not in self._adapters or self._adapters[served].loaded is not None

    async def _wait_for(self, served: str) -> None:
        if self._waiting >= self._most_waiting:
            raise Overloaded(
                f"{self._waiting} requests wait for a model already.", retry_after=_LOADING_SECONDS
            )
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._loading.wait_seconds
        self._waiting += 1
        try:
            while not self._serves(served):
                self._fetch(served)
                if self._serves(served):
                    return
                left = deadline - loop.time()
                if left <= 0:
                    raise self._later(served)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._moved.wait()
        finally:
            self._waiting -= 1

    def _fetch(self, served: str) -> None:
        """See to it that it gets loaded. Raises where it will not be."""
        model, status, autoload = self._base(served), self._switch.status, self._loading.autoload
        if status.failed or status.state is EngineState.STOPPED:
            status.require_serving()
        if self._change is not None:
            if self._change.model != model and not autoload:
                raise self._not_loaded(model)
        elif self._switch.model == model and status.state is EngineState.LOADING:
            return  # the server has only just started
        elif not autoload or self._error(served):  # what has failed is not tried again for each request
            raise self._not_loaded(served)
        elif self._switch.model == model and status.state is EngineState.SLEEPING:
            self.wake(model)
        elif self._switch.model != model:
            self.load(model)
        else:  # it runs, and the adapter does not
            raise self._not_loaded(served)

    def _not_loaded(self, served: str) -> ModelNotLoaded:
        model = self._base(served)
        error = self._error(served)
        why = f" It could not be: {error}." if error else ""
        asleep = self._switch.model == model and self._switch.status.state is EngineState.SLEEPING
        return ModelNotLoaded(
            f"The model {served!r} is not loaded.{why} An operator can load it with "
            f"POST /v1/models/{model}/{'wake' if asleep else 'load'}.",
            retry_after=_LOADING_SECONDS,
        )

    def _error(self, served: str) -> str | None:
        return self._errors.get(served) or self._errors.get(self._base(served))

    def _later(self, served: str) -> EngineNotReady:
        phase = self._switch.status.phase
        detail = f" ({phase})" if phase else ""
        return EngineNotReady(
            f"The model {self._base(served)!r} is still loading{detail}. Try again shortly.",
            retry_after=_LOADING_SECONDS,
            code="engine_loading",
        )

    # Changes.

    def load(self, name: str) -> asyncio.Task[None] | None:
        """Begin to run the model in place of what runs; None when it does already.

        Awaited, the task raises `LoadFailed`. Raises `Conflict`, `ModelNotFound`, `NotImplementedHere`.
        """
        model = self._configured_name(name)
        if self._change is None and self._serves(model):
            return None
        if self._switch.model == model and self._switch.status.state is EngineState.SLEEPING:
            return self.wake(model)
        if (
            self._configured[model].engine.get("nnodes", 1) != 1
            or self._running().engine.get("nnodes", 1) != 1
        ):
            raise NotImplementedHere(
                "An engine that spans nodes cannot be changed for another while it runs."
            )
        return self._begin("loading", model, self._load)

    def unload(self, name: str) -> asyncio.Task[None] | None:
        """Begin to end the model; None when it does not run. Raises as `load`."""
        model = self._configured_name(name)
        if self._change is None and self._switch.model != model:
            return None
        return self._begin("unloading", model, self._unload)

    def sleep(self, name: str, level: int) -> asyncio.Task[None] | None:
        """Begin to put it to sleep, see `Engine.sleep`; None when it sleeps.

        Raises `ModelNotLoaded`, and as `load`.
        """
        model = self._configured_name(name)
        if self._change is None:
            if self._switch.model != model:
                raise self._not_loaded(model)
            if self._switch.status.state is EngineState.SLEEPING:
                return None
            self._switch.require_sleep()
        return self._begin("unloading", model, lambda _: self._sleep(level))

    def wake(self, name: str) -> asyncio.Task[None] | None:
        """Begin to wake it; None when it is awake. Raises as `sleep`."""
        model = self._configured_name(name)
        if self._change is None:
            if self._switch.model != model:
                raise self._not_loaded(model)
            if self._switch.status.state is not EngineState.SLEEPING:
                return None
        return self._begin("loading", model, lambda _: self._wake())

    async def load_adapter(self, model: str, name: str, path: str) -> dict[str, Any]:
        """Serve the LoRA adapter `path` of `model` as `name`. Raises `Conflict`, and as the engine's."""
        model = self._configured_name(model)
        if name in self._names or name in self._adapters:
            raise Conflict(f"The name {name!r:.100} is taken.", param="name")
        adapter = _Adapter(name, path, model, int(time.time()), None)
        self._adapters[name] = adapter  # the name is taken from now on
        try:
            await self.enter(model)
            try:
                adapter.loaded = await self._switch.load_adapter(name, path)
            finally:
                self.leave()
        except BaseException:
            del self._adapters[name]
            raise
        return self._adapter_row(adapter)

    async def unload_adapter(self, model: str, name: str) -> None:
        """Requests that use it finish. Raises `ModelNotFound`."""
        adapter = self._adapters.get(name)
        if adapter is None or adapter.model != self._configured_name(model):
            raise ModelNotFound(f"The model {model!r:.100} has no adapter {name!r:.100}.", param="name")
        del self._adapters[name]
        self._errors.pop(name, None)
        if adapter.loaded is not None:
            await self._switch.unload_adapter(name)

    async def stop(self) -> None:
        """End what runs, and a change that is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        await self._switch.stop()

    def _configured_name(self, name: str) -> str:
        served = self.resolve(name)
        if served in self._adapters:
            raise ModelNotFound(f"{name!r:.100} is an adapter of {self._base(served)!r}.", param="model")
        return served

    def _running(self) -> Settings:
        return self._switch.settings or self._configured[self.default]

    def _begin(
        self,
        state: Literal["loading", "unloading"],
        model: str,
        work: Callable[[str], Coroutine[Any, Any, None]],
    ) -> asyncio.Task[None]:
        status = self._switch.status
        if self._change is not None or status.state is EngineState.LOADING:
            doing = self._change.state if self._change is not None else "loading"
            raise Conflict(f"The server is {doing} {self.default!r}: wait until that is done.", param="model")
        if status.failed or status.state is EngineState.STOPPED:
            status.require_serving()
        self._change = _Change(state, model)
        self._task = asyncio.create_task(self._run(work(model)))
        self._task.add_done_callback(_note)
        return self._task

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except ServeError:
            raise
        except Exception as error:
            # Nobody knows what runs now: end, to be started anew, rather than let requests wait for ever.
            logger.critical("A change of models failed unexpectedly", exc_info=error)
            self._switch.status.set(EngineState.FAILED, error=f"a change of models failed: {error!r}")
            raise
        finally:
            self._change = None
            self.moved()

    async def _load(self, model: str) -> None:
        settings, before = self._configured[model], self._switch.settings
        self._errors.pop(model, None)
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
                await self._go_back(before, str(error))
            raise failure from error
        await self._load_adapters(model)

    async def _go_back(self, before: Settings, error: str) -> None:
        model = before.model.id
        logger.error("%s could not be loaded, so %s is loaded again: %s", self.default, model, error)
        self._change = _Change("loading", model)
        try:
            await self._switch.run(before)
        except StartupError as again:
            self._switch.status.set(EngineState.FAILED, error=f"{model} could not be loaded again: {again}")
        else:
            await self._load_adapters(model)

    def _failed(self, model: str, error: StartupError) -> LoadFailed:
        self._errors[model] = str(error)
        return LoadFailed(f"{model!r} could not be loaded: {error}.", param="model")

    async def _unload(self, model: str) -> None:
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
        await self._switch.wake()

    async def _end(self) -> None:
        await self._drain()
        for adapter in self._adapters.values():
            adapter.loaded = None
        await self._switch.end()

    async def _drain(self) -> None:
        """Take no requests, and wait until those under way have ended."""
        self._switch.hold(f"{self._active} requests of {self._switch.model} finish first")
        try:
            async with asyncio.timeout(self._loading.drain_seconds):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests have not ended in time, and are ended", self._active)
            self._switch.abandon(
                ModelNotLoaded("The model was unloaded before this request had ended. Try again later.")
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ABANDONED_SECONDS):
                    await self._idle.wait()

    async def _load_adapters(self, model: str) -> None:
        """Those that it had when it ran before."""
        for adapter in [one for one in self._adapters.values() if one.model == model]:
            try:
                adapter.loaded = await self._switch.load_adapter(adapter.name, adapter.path)
                self._errors.pop(adapter.name, None)
            except ServeError as error:
                self._errors[adapter.name] = error.message
                logger.error("The adapter %s of %s could not be loaded again: %s", adapter.name, model, error)


def _note(task: asyncio.Task[None]) -> None:
    """Who asked for it may have left."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s", error)

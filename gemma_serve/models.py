"""`Models`: which models are served, what they are called, and the gate that each request for one passes.

One of the configured models runs at a time; `model_changes.py` says how that changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from .engine.base import EngineState, LoadedModel
from .engine.switch import EngineSwitch
from .errors import Conflict, EngineNotReady, ModelNotFound, Overloaded, ServeError
from .model_changes import LOADING_SECONDS, ModelChanges
from .model_names import Adapter, ModelNames
from .settings import Settings
from .token_usage import BYTES_PER_TOKEN


class Models:
    """The configured models and their adapters, by name and alias; `changes` is for operators."""

    def __init__(self, settings: Settings, switch: EngineSwitch) -> None:
        self._names = names = ModelNames(settings)
        self.changes = ModelChanges(settings.loading, names, switch)
        self.changes.on_end = self.moved
        self._loading = settings.loading
        self._limits = settings.queue
        self._switch = switch
        self._created = int(time.time())
        self._waiting = self._waiting_tokens = 0
        self._moved = asyncio.Event()

    @property
    def default(self) -> str:
        """The model that answers who names none: the one that runs, or is about to, or the first."""
        return self.changes.model or next(iter(self._names.configured))

    def resolve(self, name: str | None) -> str:
        """The served name behind `name`, which may be an alias, or absent: then it is the default's.

        Raises `ModelNotFound`, and `PermissionDenied` where the client's key is not for it.
        """
        return self._names.find(self.default if name is None else name)

    # What they are.

    def list(self) -> list[dict[str, Any]]:
        """OpenAI's model objects, with the fields of vLLM that clients read: those the client may use.

        Many clients take the first, so that is the one that runs.
        """
        names = sorted(self._names.configured, key=lambda name: name != self.default)
        return [self._row(name) for name in (*names, *self._names.adapters) if self._names.allowed(name)]

    def get(self, name: str) -> dict[str, Any]:
        """One of `list`, by name or alias. Raises `ModelNotFound`."""
        return self._row(self.resolve(name))

    def summary(self) -> dict[str, Any]:
        """Of the default."""
        model = self._names.configured[self.default].model
        return {
            "id": model.id,
            "name": model.name,
            "aliases": list(model.aliases),
            "max_model_len": self.context_length(),
        }

    def context_length(self, served: str | None = None) -> int | None:
        """In tokens, once it is known; of the default where nothing else is named."""
        model = self._names.base(served or self.default)
        known = self._switch.model_length() if self._switch.model == model else None
        return known or self._names.configured[model].model.max_length

    def loaded(self, served: str) -> LoadedModel | None:
        """None where it is not loaded."""
        if (adapter := self._names.adapters.get(served)) is not None:
            return adapter.loaded
        return self._switch.loaded() if self._switch.model == served else None

    def _row(self, served: str) -> dict[str, Any]:
        adapter = self._names.adapters.get(served)
        base = self._names.base(served)
        model, loaded = self._names.configured[base].model, self.loaded(served)
        return {
            "id": served,
            "object": "model",
            "created": adapter.created if adapter else self._created,
            "owned_by": "google",
            "root": adapter.path if adapter else model.name,
            "parent": base if adapter else None,
            "max_model_len": self.context_length(served),
            "aliases": [] if adapter else list(model.aliases),
            "family": loaded and loaded.family,
            "modalities": loaded and list(loaded.modalities),
            "state": self._state(base) if loaded or not adapter else "unloaded",
            "error": self.changes.errors.get(served),
        }

    def _state(self, model: str) -> str:
        change, status = self.changes.change, self._switch.status
        if change is not None and change.model == model:
            return change.state
        if self._switch.model != model:
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

    async def enter(self, served: str, body_bytes: int = 0) -> None:
        """Wait until the model takes requests; `leave` when this one has ended.

        Raises `ModelNotLoaded`, `EngineNotReady`, `Overloaded`.
        """
        if not self.changes.serves(served):
            await self._wait_for(served, body_bytes // BYTES_PER_TOKEN)
        self.changes.enter()

    def leave(self) -> None:
        self.changes.leave()

    def moved(self) -> None:
        """The engine's state has changed. To be called in the event loop."""
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def _wait_for(self, served: str, tokens: int) -> None:
        limits = self._limits
        if self._waiting >= limits.max_requests or self._waiting_tokens + tokens > limits.max_tokens:
            raise Overloaded(
                f"{self._waiting} requests wait for a model already.", retry_after=LOADING_SECONDS
            )
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._loading.wait_seconds
        self._waiting += 1
        self._waiting_tokens += tokens
        try:
            while not self.changes.serves(served):
                self._fetch(served)
                left = deadline - loop.time()
                if left <= 0:
                    raise self._later(served)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._moved.wait()
        finally:
            self._waiting -= 1
            self._waiting_tokens -= tokens

    def _fetch(self, served: str) -> None:
        """See to it that it gets loaded. Raises where it will not be."""
        model, status, change = self._names.base(served), self._switch.status, self.changes.change
        autoload = self._loading.autoload
        if status.failed or status.state is EngineState.STOPPED:
            status.require_serving()
        if change is not None:
            if change.model != model and not autoload:
                raise self.changes.not_loaded(model)
        elif status.state is EngineState.LOADING and (autoload or self._switch.model == model):
            return  # the server has only just started
        elif (
            not autoload or self.changes.error(served) or self.changes.load(model) is None
        ):  # what has failed is not tried for each request
            raise self.changes.not_loaded(served)

    def _later(self, served: str) -> EngineNotReady:
        phase = self._switch.status.phase
        detail = f" ({phase})" if phase else ""
        return EngineNotReady(
            f"The model {self._names.base(served)!r} is still loading{detail}. Try again shortly.",
            code="engine_loading",
        )

    # Adapters.

    async def load_adapter(self, model: str, name: str, path: str) -> dict[str, Any]:
        """Serve the LoRA adapter `path` of `model` as `name`. Raises `Conflict`, and as the engine's."""
        model = self._names.find_model(model)
        if self._names.taken(name):
            raise Conflict(f"The name {name!r:.100} is taken.", param="name")
        adapter = Adapter(name, path, model, int(time.time()), loading=True)
        self._names.adapters[name] = adapter  # the name is taken from now on
        try:
            await self.enter(model)
            try:
                adapter.loaded = await self._switch.load_adapter(name, path)
            finally:
                self.leave()
        except BaseException:
            del self._names.adapters[name]
            raise
        finally:
            adapter.loading = False
        return self._row(name)

    async def unload_adapter(self, model: str, name: str) -> None:
        """Requests that use it finish. Raises `ModelNotFound`, `Conflict`."""
        adapter = self._names.adapters.get(name)
        if adapter is None or adapter.model != self._names.find_model(model):
            raise ModelNotFound(f"The model {model!r:.100} has no adapter {name!r:.100}.", param="name")
        if adapter.loading:
            raise Conflict(
                f"The adapter {name!r:.100} is being loaded: wait until that is done.", param="name"
            )
        del self._names.adapters[name]
        self.changes.errors.pop(name, None)
        if adapter.loaded is not None:
            self.changes.enter()
            try:
                await self._switch.unload_adapter(name)
            except ServeError:
                self._names.adapters.setdefault(name, adapter)  # it is still there
                raise
            finally:
                self.changes.leave()

"""What the models are called: their names, their aliases, and their adapters' names."""

from __future__ import annotations

from dataclasses import dataclass

from .clients import current_client
from .engine.base import LoadedModel
from .errors import ModelNotFound, PermissionDenied
from .settings import Settings


@dataclass(slots=True)
class Adapter:
    """A LoRA adapter: a model of its own to clients."""

    name: str
    path: str
    model: str
    """That it changes."""
    created: int
    """Seconds since 1970."""
    loaded: LoadedModel | None = None
    """None while its model does not run."""
    loading: bool = False
    """Nobody may take it away now: the engine would keep it."""


class ModelNames:
    """A model is called by the name that it is served under, an alias, or where it is loaded from."""

    def __init__(self, settings: Settings) -> None:
        self.configured = settings.of_models()
        self.adapters: dict[str, Adapter] = {}
        self._names = {
            name: model for model, one in self.configured.items() for name in (model, *one.model.aliases)
        }
        for model, one in self.configured.items():
            self._names.setdefault(one.model.name, model)

    def find(self, name: str) -> str:
        """The served name of a model or an adapter.

        Raises `ModelNotFound`, and `PermissionDenied` where the client's key is not for it.
        """
        served = name if name in self.adapters else self._names.get(name)
        if served is None:
            known = ", ".join(repr(one) for one in (*self.configured, *self.adapters) if self.allowed(one))
            raise ModelNotFound(
                f"The model {name!r:.100} does not exist; this server has {known or 'none for this key'}.",
                param="model",
            )
        if not self.allowed(served):
            raise PermissionDenied(
                f"This API key has no access to the model {served!r}.", param="model", code="model_not_found"
            )
        return served

    def find_model(self, name: str) -> str:
        """As `find`, for what is done to a model, not to an adapter of it."""
        served = self.find(name)
        if served in self.adapters:
            raise ModelNotFound(f"{name!r:.100} is an adapter of {self.base(served)!r}.", param="model")
        return served

    def taken(self, name: str) -> bool:
        return name in self._names or name in self.adapters

    def base(self, served: str) -> str:
        """The model that has to run for it: an adapter's, or itself."""
        adapter = self.adapters.get(served)
        return served if adapter is None else adapter.model

    def allowed(self, served: str) -> bool:
        """May the client use it?"""
        client = current_client.get()
        if client is None or not client.models:
            return True
        base = self.base(served)
        names = {served, *(name for name, model in self._names.items() if model == base)}
        return not client.models.isdisjoint(names)

"""Which models are served and what they are called."""

from __future__ import annotations

import time
from typing import Any

from .clients import current_client
from .engine.base import Engine
from .errors import ModelNotFound, PermissionDenied
from .settings import Settings


class Models:
    """The configured models, by name and alias."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._model = settings.model
        self._engine = engine
        self._created = int(time.time())
        self._names = {self._model.id, *self._model.aliases, self._model.name}

    def resolve(self, name: str | None) -> str:
        """The served name behind `name`, which may be an alias, or absent where there is only one model.

        Raises `ModelNotFound`, and `PermissionDenied` where the client's key is not for it.
        """
        if name is None or name in self._names:
            if not self._allowed():
                raise PermissionDenied(
                    f"This API key has no access to the model {self._model.id!r}.",
                    param="model",
                    code="model_not_found",
                )
            return self._model.id
        raise ModelNotFound(
            f"The model {name!r:.100} does not exist; this server has {self._model.id!r}.", param="model"
        )

    def list(self) -> list[dict[str, Any]]:
        """OpenAI's model objects, with the fields of vLLM that clients read: those the client may use."""
        if not self._allowed():
            return []
        return [
            {
                "id": self._model.id,
                "object": "model",
                "created": self._created,
                "owned_by": "google",
                "root": self._model.name,
                "max_model_len": self.context_length(),
                "aliases": list(self._model.aliases),
                "state": str(self._engine.status.state),
            }
        ]

    @property
    def default(self) -> str:
        """The model that answers who names none."""
        return self._model.id

    def context_length(self) -> int | None:
        """In tokens, once it is known."""
        return self._engine.model_length() or self._model.max_length

    def _allowed(self) -> bool:
        client = current_client.get()
        return client is None or not client.models or not client.models.isdisjoint(self._names)

    def get(self, name: str) -> dict[str, Any]:
        """One of `list`, by name or alias. Raises `ModelNotFound`."""
        served = self.resolve(name)
        return next(model for model in self.list() if model["id"] == served)

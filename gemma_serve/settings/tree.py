"""`Settings`, the whole tree, and the values of vLLM's engine arguments within it."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ..engine_fields import ENGINE_FIELDS
from .base import text_value
from .sections import (
    CacheSettings,
    ChatSettings,
    HealthSettings,
    LimitsSettings,
    LoadingSettings,
    LogSettings,
    ModelSettings,
    OtelSettings,
    PerformanceSettings,
    QueueSettings,
    ServerSettings,
    StorageSettings,
    SupervisorSettings,
)
from .security import SecuritySettings

Settable = Mapping[str, Mapping[str, Any]]


class ListedModel(ModelSettings):
    """A model that may be loaded in place of `model`; its name is the one that it is listed under."""

    engine: dict[str, Any] = Field(default_factory=dict)
    """Arguments of vLLM's engine for this model. Those of the first model are not taken over."""

    @field_validator("engine", mode="before")
    @classmethod
    def _engine_fields(cls, value: Any) -> Any:
        return _engine_arguments(value)

    @field_validator("served_name")
    @classmethod
    def _named_already(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("the name that it is listed under is the one it is served by")
        return value


class Settings(BaseSettings):
    """The whole tree, immutable. Build it with `load`, which names the source of every wrong value."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    models: dict[str, ListedModel] = Field(default_factory=dict)
    loading: LoadingSettings = LoadingSettings()
    security: SecuritySettings = SecuritySettings()
    performance: PerformanceSettings = PerformanceSettings()
    storage: StorageSettings = StorageSettings()
    cache: CacheSettings = CacheSettings()
    chat: ChatSettings = ChatSettings()
    limits: LimitsSettings = LimitsSettings()
    queue: QueueSettings = QueueSettings()
    health: HealthSettings = HealthSettings()
    supervisor: SupervisorSettings = SupervisorSettings()
    log: LogSettings = LogSettings()
    otel: OtelSettings = OtelSettings()
    engine: dict[str, Any] = Field(default_factory=dict)

    @field_validator("engine", mode="before")
    @classmethod
    def _engine_fields(cls, value: Any) -> Any:
        return _engine_arguments(value)

    @field_validator("models", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """An option or a variable holds a model as JSON."""
        if not isinstance(value, Mapping):
            raise ValueError("models must be a mapping: the name of each, and its settings below it")
        return {name: text_value(item) if isinstance(item, str) else item for name, item in value.items()}

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        owners: dict[str, str] = {}
        for id, settings in [(self.model.id, self.model), *self.models.items()]:
            for name in dict.fromkeys((id, *settings.aliases)):
                if name in owners:
                    raise ValueError(f"models.{id}: the name {name!r} is {owners[name]}'s already")
                owners[name] = id
        return self

    def of_models(self) -> dict[str, Settings]:
        """By name: what the server runs with when it runs that model, the one of the start first."""
        return {self.model.id: self} | {
            name: self.model_copy(
                update={
                    "model": ModelSettings(
                        **listed.model_dump(exclude={"engine", "served_name"}), served_name=name
                    ),
                    "engine": listed.engine,
                }
            )
            for name, listed in self.models.items()
        }

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *others: Any,
        **named: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` merged: a test or an embedding program is not at the mercy of the environment."""
        return (init_settings,)

    @classmethod
    def load(
        cls,
        *,
        config: str | os.PathLike[str] | None = None,
        overrides: Settable | None = None,
        environ: Mapping[str, str] | None = None,
        env_file: str | os.PathLike[str] | None = ".env",
    ) -> Settings:
        """Read every source. Raises `SettingsError` with a line for each wrong or unknown setting."""
        from .sources import load_with_sources  # which makes the tree, and so has to know it

        return load_with_sources(config=config, overrides=overrides, environ=environ, env_file=env_file)[0]


# These have a setting of their own, whose value the rest of the server must know.
_OWNED_ENGINE_FIELDS = {
    "model": "model.name",
    "served_model_name": "model.served_name",
    "reasoning_parser": "model.reasoning_parser",
    "logging_config": "log.level and log.format",
    "otlp_traces_endpoint": "otel.endpoint",
}


def _engine_arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("engine must be a mapping of vLLM engine arguments")
    for name in value:
        if name in _OWNED_ENGINE_FIELDS:
            raise ValueError(f"set {_OWNED_ENGINE_FIELDS[name]} in place of engine.{name}")
        if name not in ENGINE_FIELDS:
            raise ValueError(
                f"engine.{name} is not an argument of vLLM's engine{nearest(name, ENGINE_FIELDS)}"
            )
    return {name: _engine_value(name, item) for name, item in value.items()}


def _engine_value(name: str, value: Any) -> Any:
    """The value as vLLM's argument wants it. Raises `ValueError` when it cannot be that."""
    kind = _engine_type(name)
    if kind is None:
        return text_value(value) if isinstance(value, str) else value
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    candidates = [value, *([text_value(value)] if isinstance(value, str) else [])]
    if isinstance(value, str) and ENGINE_FIELDS[name].removesuffix(" | None") != "str":
        candidates.reverse()
    for candidate in candidates:
        with contextlib.suppress(ValidationError):
            return adapter.validate_python(candidate)
    raise ValueError(f"engine.{name} = {value!r} should be {ENGINE_FIELDS[name]}")


def _engine_type(name: str) -> Any:
    """The argument's type, or None where it is a class of vLLM's own, which vLLM checks."""
    try:
        # The text was made by `make lock` from vLLM's annotations; it is no input.
        return eval(ENGINE_FIELDS[name], {"__builtins__": _BUILTIN_TYPES, "Any": Any, "Literal": Literal})
    except (NameError, TypeError):
        return None


_BUILTIN_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, list, dict, tuple, set)}


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing where no name is like it."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""

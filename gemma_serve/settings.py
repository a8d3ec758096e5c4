"""Every setting, its default and its meaning: the only reader of environment, `.env` and YAML.

A value comes from the first of: command line, environment (`GEMMA_<SECTION>_<FIELD>`), `.env`, the YAML file
named by `--config` or `GEMMA_CONFIG`, the defaults below. README's table is checked against these classes.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from dotenv import dotenv_values
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FilePath,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from .engine_fields import ENGINE_FIELDS
from .errors import StartupError

PREFIX = "GEMMA_"
DEMO_MODEL = "gemma-demo"
"""The model name that stands for the model shipped inside this package."""

Settable = Mapping[str, Mapping[str, Any]]

# Kubernetes sets these for each Service of the namespace; a Service called `gemma-server` collides with our
# prefix (GEMMA_SERVER_PORT=tcp://10.0.0.1:80). https://kubernetes.io/docs/concepts/services-networking/service/
_KUBERNETES_NAME = re.compile(
    r"^GEMMA_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$"
)
_KUBERNETES_VALUE = re.compile(r"^(tcp|udp|sctp)://\S+:\d+$")


class SettingsError(StartupError):
    """One or more settings are wrong; the message has a line for each."""


def _comma_list(value: Any) -> Any:
    """Environment variables hold lists as `a,b`, or as JSON."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            return _text_value(value)
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_comma_list)]
UpperCase = BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ServerSettings(Section):
    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` for every interface, as in a container."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and says which."""
    workers: int = 1
    """API processes. Only 1 for now: each would load an engine of its own."""
    max_body_bytes: int = Field(default=10_000_000, ge=1_000)
    """Largest request body in bytes; a longer one gets 413."""
    keep_alive_seconds: float = Field(default=15, ge=0)
    """Silence in a stream of events after which a comment is sent, so that no proxy cuts it; 0 sends none."""
    drain_delay_seconds: float = Field(default=0, ge=0)
    """After SIGTERM, how long new requests are served while `/health/ready` is 503: load balancers lag."""
    shutdown_timeout_seconds: float = Field(default=30, ge=0)
    """How long running requests may take to finish after that."""

    @field_validator("workers")
    @classmethod
    def _one_worker(cls, value: int) -> int:
        if value != 1:
            raise ValueError(
                "must be 1: each worker would load an engine of its own; run more replicas instead"
            )
        return value


class ModelSettings(Section):
    name: str = Field(default="google/gemma-2b-it", min_length=1)
    """Hugging Face id or local folder; `gemma-demo` is the tiny model inside this package."""
    served_name: str | None = None
    """The name clients use; by default the last part of `name`."""
    aliases: Names = ()
    """Other names that clients may use for it, such as `gpt-4o-mini`."""
    max_length: int | None = Field(default=None, ge=16)
    """Context length in tokens, prompt and answer together; by default what the model was made for."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Used when a request gives none; by default what the model's own generation_config.json says."""
    chat_template: FilePath | None = None
    """Path of a Jinja chat template; by default ours for the Gemma family, or the model's own."""
    tool_parser: str = "auto"
    """vLLM's parser of the model's tool calls; `auto` takes the Gemma family's, `none` turns tools off."""
    reasoning_parser: str = "auto"
    """vLLM's parser that separates reasoning from the answer; `auto` takes the family's, `none` has none."""

    @property
    def id(self) -> str:
        return self.served_name or self.name.rstrip("/").rsplit("/", 1)[-1]


class SecuritySettings(Section):
    api_key_required: bool = False
    """Refuse requests without a valid API key. Not there yet: only `false` is accepted."""
    rate_limit_per_minute: int = Field(default=0, ge=0)
    """Requests per minute and client; 0 is no limit. Not there yet: only 0 is accepted."""
    allowed_origins: Names = ()
    """Origins whose pages may call the API from a browser (CORS), such as `https://app.example.com`."""

    @field_validator("api_key_required")
    @classmethod
    def _no_keys_yet(cls, value: bool) -> bool:
        if value:
            raise ValueError("API keys are not built yet: put an authenticating proxy in front for now")
        return value

    @field_validator("rate_limit_per_minute")
    @classmethod
    def _no_limits_yet(cls, value: int) -> int:
        if value:
            raise ValueError("rate limits are not built yet: limit in a proxy for now")
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s,*]+", origin):
                raise ValueError(f"{origin!r} is not an origin: write scheme://host[:port], without a path")
        return value


class PerformanceSettings(Section):
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the model runs; `auto` takes the GPU when there is one."""
    precision: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Type of the weights and activations; `auto` takes what the model was published in."""


class CacheSettings(Section):
    enabled: bool = False
    """Answer repeated questions from a cache. Not there yet: only `false` is accepted."""

    @field_validator("enabled")
    @classmethod
    def _no_cache_yet(cls, value: bool) -> bool:
        if value:
            raise ValueError("the response cache is not built yet")
        return value


class LogSettings(Section):
    level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], UpperCase] = "INFO"
    """Least severe lines that are written."""
    format: Literal["text", "json"] = "text"
    """`text`, or `json`: one object a line with request id, model, tokens and time to first token."""
    prompts: bool = False
    """Write prompts and sampling parameters to the log; they may hold personal data."""


class HealthSettings(Section):
    stall_seconds: float = Field(default=60, gt=0)
    """Not ready when the engine has work and finishes no step for so long; longer than its longest step."""
    stall_restart_seconds: float = Field(default=180, gt=0)
    """An engine that finishes no step for so long is killed and started again; its requests go on."""


class QueueSettings(Section):
    max_requests: int = Field(default=4096, ge=0)
    """Most requests that wait for the engine; further ones get 503 with `Retry-After`."""
    max_tokens: int = Field(default=2_000_000, ge=0)
    """Most prompt tokens, estimated from the size of the bodies, that wait for the engine."""
    wait_seconds: float = Field(default=120, gt=0)
    """Longest that a request waits for the engine before it gets 503 with `Retry-After`."""


class SupervisorSettings(Section):
    max_restarts: int = Field(default=10, ge=0)
    """How often a dead engine is started again within the window before the server gives up and exits."""
    restart_window_seconds: float = Field(default=600, gt=0)
    """The window of `max_restarts`."""


class LimitsSettings(Section):
    max_n: int = Field(default=128, ge=1)
    """Most answers (`n`) that one request may ask for."""
    max_sequences: int = Field(default=1024, ge=1)
    """Most answers that one request with several prompts may ask for: prompts times `n`."""
    request_timeout_seconds: float = Field(default=0, ge=0)
    """Longest time for one answer, after which it ends with an error; 0 is no limit."""
    max_logprobs: int = Field(default=20, ge=0)
    """Most `top_logprobs` or `prompt_logprobs` a token; each is memory and time in the engine."""


class Settings(BaseSettings):
    """The whole tree, immutable. Build it with `load`, which names the source of every wrong value."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    security: SecuritySettings = SecuritySettings()
    performance: PerformanceSettings = PerformanceSettings()
    cache: CacheSettings = CacheSettings()
    limits: LimitsSettings = LimitsSettings()
    queue: QueueSettings = QueueSettings()
    health: HealthSettings = HealthSettings()
    supervisor: SupervisorSettings = SupervisorSettings()
    log: LogSettings = LogSettings()
    engine: dict[str, Any] = Field(default_factory=dict)

    @field_validator("engine", mode="before")
    @classmethod
    def _engine_fields(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError("engine must be a mapping of vLLM engine arguments")
        for name in value:
            if name in _OWNED_ENGINE_FIELDS:
                raise ValueError(f"set {_OWNED_ENGINE_FIELDS[name]} in place of engine.{name}")
            if name not in ENGINE_FIELDS:
                raise ValueError(
                    f"engine.{name} is not an argument of vLLM's engine{_nearest(name, ENGINE_FIELDS)}"
                )
        return {name: _engine_value(name, item) for name, item in value.items()}

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
        return load_with_sources(config=config, overrides=overrides, environ=environ, env_file=env_file)[0]


# These have a setting of their own, whose value the rest of the server must know.
_OWNED_ENGINE_FIELDS = {
    "model": "model.name",
    "served_model_name": "model.served_name",
    "reasoning_parser": "model.reasoning_parser",
    "logging_config": "log.level and log.format",
}


def _text_value(text: str) -> Any:
    """What an environment variable or option says: JSON where it is JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _engine_value(name: str, value: Any) -> Any:
    """The value as vLLM's argument wants it. Raises `ValueError` when it cannot be that."""
    kind = _engine_type(name)
    if kind is None:
        return _text_value(value) if isinstance(value, str) else value
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    candidates = [value, *([_text_value(value)] if isinstance(value, str) else [])]
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


@dataclass(frozen=True)
class Source:
    """Where a value came from: `label` for messages, `values` as section → field → value."""

    label: str
    values: Settable


def load_with_sources(
    *,
    config: str | os.PathLike[str] | None = None,
    overrides: Settable | None = None,
    environ: Mapping[str, str] | None = None,
    env_file: str | os.PathLike[str] | None = ".env",
) -> tuple[Settings, list[Source]]:
    """As `Settings.load`; also the sources, strongest first."""
    environ = os.environ if environ is None else environ
    dotenv = _read_dotenv(env_file)
    config = config or environ.get(f"{PREFIX}CONFIG") or dotenv.get(f"{PREFIX}CONFIG")
    sources = [Source("command line", overrides or {})]
    problems: list[str] = []
    for label, variables in (("environment", environ), (str(env_file), dotenv)):
        ours = _our_variables(variables)
        problems += _unknown_variables(ours, label)
        sources.append(Source(label, _Variables(ours)()))
    if config:
        path = find_config(config)
        sources.append(Source(str(path), _read_yaml(path)))
    merged: dict[str, dict[str, Any]] = {}
    for source in reversed(sources):
        for section, values in source.values.items():
            known = merged.setdefault(section, {})
            if isinstance(values, Mapping):
                known.update(values)
            else:
                problems.append(f"{section} = {values!r} ({source.label}): must be a mapping of settings")
    try:
        settings = Settings(**merged)  # type: ignore[arg-type]
    except ValidationError as error:
        problems += [_explain(dict(item), sources) for item in error.errors()]
    if problems:
        raise SettingsError("\n".join(problems))
    return settings, sources


class _Variables(EnvSettingsSource):
    """pydantic-settings' reading of `GEMMA_SECTION_FIELD` from a given mapping."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = {name.lower(): value for name, value in variables.items()}
        super().__init__(Settings, env_prefix=PREFIX, env_nested_delimiter="_", env_nested_max_split=1)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._variables

    def decode_complex_value(self, field_name: str, field: Any, value: Any) -> Any:
        return value  # lists are comma lists, engine values are read in `_engine_value`


def _our_variables(variables: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in variables.items()
        if name.upper().startswith(PREFIX)
        and value  # compose files and charts write VARIABLE= for "not set"
        and name.upper() not in _NOT_SETTINGS
        and not _KUBERNETES_NAME.match(name.upper())
        and not (name.upper().endswith("PORT") and _KUBERNETES_VALUE.match(value))
    }


# Read elsewhere: the YAML file's name, the set-up's choice of engine, logs.py's word to child processes.
_NOT_SETTINGS = {"GEMMA_CONFIG", "GEMMA_SETUP", "GEMMA_SERVE_ENGINE_LOG_FORMAT"}


def _unknown_variables(variables: Mapping[str, str], label: str) -> Iterator[str]:
    """Names whose section does not exist; an unknown field of a known section is found by validation."""
    for name in variables:
        section = name.upper().removeprefix(PREFIX).split("_", 1)[0].lower()
        if section not in Settings.model_fields or "_" not in name.upper().removeprefix(PREFIX):
            yield f"{name} ({label}): no such setting{_nearest(name.upper(), all_variables())}"


def all_variables() -> list[str]:
    """Every environment variable that sets something, engine arguments included."""
    names = [variable_name(section, field) for section, field, _ in fields()]
    return names + [variable_name("engine", name) for name in ENGINE_FIELDS]


def fields() -> Iterator[tuple[str, str, Any]]:
    """(section, field, pydantic FieldInfo) of every setting but the engine's."""
    for section, info in Settings.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            for field, field_info in info.annotation.model_fields.items():
                yield section, field, field_info


def variable_name(section: str, field: str) -> str:
    return f"{PREFIX}{section}_{field}".upper()


def source_of(section: str, field: str, sources: list[Source]) -> str:
    for source in sources:
        values = source.values.get(section)
        if isinstance(values, Mapping) and field in values:
            return source.label
    return "default"


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _explain(error: dict[str, Any], sources: list[Source]) -> str:
    """One validation error as a sentence with the setting's name, its value, its source and what is right."""
    section, field = (*map(str, error["loc"][:2]), "")[:2]
    if error["type"] == "extra_forbidden":
        if not field:
            near = _nearest(section, Settings.model_fields)
            return f"{section} ({source_label(section, sources)}): no such section{near}"
        name = f"{section}.{field}"
        near = _nearest(name, [f"{s}.{f}" for s, f, _ in fields()])
        origin = source_of(section, field, sources)
        return f"{name} ({variable_name(section, field)}, from {origin}): no such setting{near}"
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should be", "must be")
    if section == "engine":
        named = re.search(r"engine\.(\w+)", message)
        name = named[1] if named else ""
        return f"{message} ({variable_name(section, name)}, from {source_of(section, name, sources)})"
    origin = source_of(section, field, sources)
    return (
        f"{section}.{field} ({variable_name(section, field)}, from {origin}) = {error['input']!r}: {message}"
    )


def source_label(section: str, sources: list[Source]) -> str:
    return next((source.label for source in sources if section in source.values), "default")


def find_config(name: str | os.PathLike[str]) -> Path:
    """A file as named, or a preset of `configs/` by its bare name. Raises `SettingsError`."""
    path = Path(name)
    if path.is_file():
        return path
    package = Path(__file__).parent
    presets = {
        file.stem: file
        for folder in (package.parent / "configs", package / "configs")
        for file in sorted(folder.glob("*.yaml"))
    }
    if str(name) in presets:
        return presets[str(name)]
    known = f"; the presets are {', '.join(sorted(presets))}" if presets else ""
    raise SettingsError(f"no such configuration file: {name}{known}")


def _read_dotenv(env_file: str | os.PathLike[str] | None) -> dict[str, str]:
    if env_file is None or not Path(env_file).is_file():
        return {}
    try:
        return {name: value for name, value in dotenv_values(env_file).items() if value is not None}
    except UnicodeDecodeError as error:
        raise SettingsError(f"{env_file} is not UTF-8 text: {error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold sections such as `server:` and `model:`, not {content!r:.60}")
    for section, values in content.items():
        wrong = [
            key
            for key in (section, *(values if isinstance(values, dict) else ()))
            if not isinstance(key, str)
        ]
        if wrong:
            raise SettingsError(f"{path}: {wrong[0]!r} is not a name; put it in quotes if it is meant as one")
    return {section: {} if values is None else values for section, values in content.items()}

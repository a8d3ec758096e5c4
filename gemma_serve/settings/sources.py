"""Reading the settings: command line, environment, `.env` and YAML, and a sentence for each mistake."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from dotenv import dotenv_values
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from ..engine_fields import ENGINE_FIELDS
from ..errors import StartupError
from .base import Section
from .tree import ListedModel, Settable, Settings, nearest

PREFIX = "GEMMA_"

# Kubernetes sets these for each Service of the namespace; a Service called `gemma-server` collides with our
# prefix (GEMMA_SERVER_PORT=tcp://10.0.0.1:80). https://kubernetes.io/docs/concepts/services-networking/service/
_KUBERNETES_NAME = re.compile(
    r"^GEMMA_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$"
)
_KUBERNETES_VALUE = re.compile(r"^(tcp|udp|sctp)://\S+:\d+$")


class SettingsError(StartupError):
    """One or more settings are wrong; the message has a line for each."""


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
            yield f"{name} ({label}): no such setting{nearest(name.upper(), all_variables())}"


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


def _explain(error: dict[str, Any], sources: list[Source]) -> str:
    """One validation error as a sentence with the setting's name, its value, its source and what is right."""
    section, field = (*map(str, error["loc"][:2]), "", "")[:2]
    if section == "models" and field:
        return _explain_listed(error, source_of(section, field, sources))
    if error["type"] == "extra_forbidden":
        if not field:
            near = nearest(section, Settings.model_fields)
            return f"{section} ({source_label(section, sources)}): no such section{near}"
        name = f"{section}.{field}"
        near = nearest(name, [f"{s}.{f}" for s, f, _ in fields()])
        origin = source_of(section, field, sources)
        return f"{name} ({variable_name(section, field)}, from {origin}): no such setting{near}"
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should be", "must be")
    if section == "engine":
        named = re.search(r"engine\.(\w+)", message)
        name = named[1] if named else ""
        return f"{message} ({variable_name(section, name)}, from {source_of(section, name, sources)})"
    if not field:  # what a section's settings say together
        return message
    origin = source_of(section, field, sources)
    value = masked(field, error["input"])
    return f"{section}.{field} ({variable_name(section, field)}, from {origin}) = {value!r}: {message}"


def _explain_listed(error: dict[str, Any], origin: str) -> str:
    """As `_explain`, of a setting of one of the further models."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        near = nearest(str(error["loc"][-1]), ListedModel.model_fields)
        return f"{name} (from {origin}): no such setting{near}"
    message = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{name} (from {origin}) = {masked('', error['input'])!r}: {message}"


def source_label(section: str, sources: list[Source]) -> str:
    return next((source.label for source in sources if section in source.values), "default")


def find_config(name: str | os.PathLike[str]) -> Path:
    """A file as named, or a preset of `configs/` by its bare name. Raises `SettingsError`."""
    path = Path(name)
    if path.is_file():
        return path
    package = Path(__file__).parent.parent
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


def digest(settings: Settings) -> str:
    """SHA-256 of the effective settings less their secrets: equal where two servers are set alike."""
    values = masked("", settings.model_dump())
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


_SECRETS = ("_token", "_key", "_keys", "_password", "_secret")
_MASK = "********"


def masked(name: str, value: Any) -> Any:
    """The setting's value as plain data that may be shown: secrets, also within it, are stars."""
    if value and name.endswith(_SECRETS) and not isinstance(value, Path):  # where a key lies is none
        return _MASK
    if isinstance(value, dict):
        return {key: masked(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked("", item) for item in value]
    if isinstance(value, str):
        value = re.sub(r"(?<=://)([^:/@\s]*):\S*@", rf"\1:{_MASK}@", value)  # a URL's password
        return re.sub(r"([?&]password=)[^&\s]*", rf"\1{_MASK}", value)  # as redis-py takes it, too
    return str(value) if isinstance(value, Path) else value

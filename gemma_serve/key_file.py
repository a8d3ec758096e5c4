"""The keys' file: YAML that `gemma-server keys` writes and the server reads."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from .clients import Quotas, Scope
from .errors import StartupError, field_path

_HEADER = "# Written by `gemma-server keys`, which does not keep comments. It holds digests, not keys.\n"


class KeyFileError(StartupError):
    """The file cannot be read or written; the message names it and says why."""


def _end_of(value: Any) -> Any:
    """A bare date is good until its end, in UTC; 9999-12-31 has none, and so is never over."""
    if isinstance(value, str):  # a date in quotes is no less one
        with contextlib.suppress(ValueError):
            value = date.fromisoformat(value)
    if isinstance(value, datetime) or not isinstance(value, date):
        return value
    if value == date.max:
        return datetime.max.replace(tzinfo=UTC)
    return datetime(value.year, value.month, value.day, tzinfo=UTC) + timedelta(days=1)


def _in_utc(value: datetime | None) -> datetime | None:
    """A time without a zone is in UTC."""
    if value is None or value.tzinfo is None:
        return value and value.replace(tzinfo=UTC)
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("lies outside the years 1 to 9999 in UTC") from None


class KeyLimits(BaseModel):
    """As `Quotas`; what is left out is the server's default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    requests_per_minute: int | None = Field(default=None, ge=0)
    tokens_per_minute: int | None = Field(default=None, ge=0)
    tokens_per_day: int | None = Field(default=None, ge=0)
    in_flight: int | None = Field(default=None, ge=0)

    def over(self, defaults: Quotas) -> Quotas:
        return replace(defaults, **self.model_dump(exclude_none=True))


class KeyEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = ("inference",)
    models: tuple[str, ...] = ()
    limits: KeyLimits = KeyLimits()
    weight: Annotated[float, Field(gt=0)] = 1.0
    priority: int = 0
    expires: Annotated[datetime | None, BeforeValidator(_end_of), AfterValidator(_in_utc)] = None
    disabled: bool = False


_ENTRIES = TypeAdapter(list[KeyEntry])
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast


def read_keys(path: Path) -> list[KeyEntry]:
    """Every key of the file. Raises `KeyFileError`."""
    try:
        content = yaml.load(path.read_bytes(), _LOADER)
    except FileNotFoundError as error:
        raise KeyFileError(f"there is no keys' file {path}; `gemma-server keys create` makes it") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise KeyFileError(f"{path} cannot be read as YAML: {' '.join(str(error).split()):.300}") from error
    except ValueError as error:  # PyYAML's own of 2027-02-30
        raise KeyFileError(f"{path} has a date or number that does not exist: {error}") from error
    if not isinstance(content, dict) or content.keys() != {"keys"}:
        raise KeyFileError(f"{path} must hold `keys:` and a list of them, and nothing else")
    try:
        entries = _ENTRIES.validate_python(content["keys"] or [])
    except ValidationError as error:
        fault = error.errors()[0]
        # Not the value: someone may have put the key where its digest belongs.
        raise KeyFileError(f"{path}: keys{field_path(fault['loc'])}: {fault['msg']}") from error
    for what in ("name", "sha256"):
        for value, times in Counter(getattr(entry, what) for entry in entries).most_common(1):
            if times > 1:
                raise KeyFileError(f"{path}: {times} keys have the {what} {value!r:.20}")
    return entries


def write_keys(path: Path, entries: Sequence[KeyEntry]) -> None:
    """Replace the file in one step, so that the server never reads half of it. Raises `KeyFileError`."""
    keys = [_shown(entry) for entry in entries]
    text = _HEADER + yaml.safe_dump({"keys": keys}, sort_keys=False)
    target = path.resolve()  # a link stays one
    try:
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=".keys-", delete=False) as new:
            new.write(text)
            new.flush()
            os.fsync(new.fileno())
            if target.exists():  # the server may run as another user
                before = target.stat()
                if os.geteuid() == 0:
                    os.fchown(new.fileno(), before.st_uid, before.st_gid)
                os.fchmod(new.fileno(), before.st_mode)
        os.replace(new.name, target)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error.strerror}") from error


def _shown(entry: KeyEntry) -> dict[str, Any]:
    shown = entry.model_dump(mode="json", exclude_defaults=True)
    if entry.expires is not None:
        shown["expires"] = entry.expires  # YAML has times of its own
    return shown


@contextlib.contextmanager
def edited(path: Path) -> Iterator[list[KeyEntry]]:
    """The file's keys, to be changed; written at the end. Another edit waits. Raises `KeyFileError`."""
    try:
        folder = os.open(path.resolve().parent, os.O_RDONLY)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        entries = read_keys(path) if path.exists() and path.stat().st_size else []
        yield entries
        write_keys(path, entries)
    finally:
        os.close(folder)

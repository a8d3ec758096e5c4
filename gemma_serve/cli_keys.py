"""`gemma-server keys`: API keys in their file: create, list, revoke, verify; and their usage."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import re
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from .api_keys import digest_of
from .clients import Scope
from .errors import StartupError, field_path
from .key_file import KeyEntry, KeyLimits, edited, read_keys
from .settings import load_with_sources

_EPILOG = """\
The file is --file, or the setting security.api_keys_file. A running server takes an edit up within 2 s.

examples:
  gemma-server keys create alice --file keys.yaml
  gemma-server keys create ci --file keys.yaml --expires 30d --requests-per-minute 60 --model gemma-3-4b-it
  gemma-server keys create ops --file keys.yaml --scope admin --scope metrics
  gemma-server keys list --file keys.yaml
  gemma-server keys revoke alice --file keys.yaml
  gemma-server keys verify --file keys.yaml < key.txt
  OPENAI_API_KEY=sk-gemma-... gemma-server keys usage --url http://localhost:8000
"""

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The sub-commands of `gemma-server keys`."""
    parser.epilog = _EPILOG
    commands = parser.add_subparsers(dest="keys_command", metavar="ACTION", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=summary.capitalize() + ".",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        added.add_argument("--config", metavar="FILE", help="the server's YAML file (GEMMA_CONFIG)")
        if name != "usage":
            added.add_argument("--file", type=Path, metavar="FILE", help="the keys' file")
        return added

    create = command("create", _create, "make a key and show it, this once")
    create.add_argument("name", metavar="NAME", help="what logs, metrics and usage call it")
    create.add_argument(
        "--scope",
        action="append",
        choices=get_args(Scope),
        help="what it is for, by default inference; may be repeated",
    )
    create.add_argument(
        "--model", action="append", default=[], metavar="NAME", help="allow only this model; may be repeated"
    )
    create.add_argument("--expires", metavar="WHEN", help="2027-01-31, or from now: 12h, 30d, 8w")
    for name in KeyLimits.model_fields:
        create.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            metavar="N",
            help="instead of the server's; 0 is none",
        )
    command("list", _list, "show every key of the file, without the keys themselves")
    revoke = command("revoke", _revoke, "refuse a key from now on")
    revoke.add_argument("name", metavar="NAME")
    command("verify", _verify, "say whose key it is that is typed or piped in; fails when it is no good")
    usage = command("usage", _usage, "show each key's requests and tokens by day, from a running server")
    usage.add_argument("--url", metavar="URL", help="the server; by default the one of the settings")
    usage.add_argument("--days", type=int, default=7, metavar="N", help="how many days, by default 7")


def _file(options: argparse.Namespace) -> Path:
    path = options.file or load_with_sources(config=options.config)[0].security.api_keys_file
    if path is None:
        raise StartupError("which file? Name it with --file, or in the setting security.api_keys_file")
    return Path(path)


def _create(options: argparse.Namespace) -> int:
    path = _file(options)
    key = f"sk-gemma-{secrets.token_urlsafe(32)}"
    try:
        entry = KeyEntry(
            name=options.name,
            sha256=digest_of(key).hex(),
            scopes=tuple(options.scope or ("inference",)),
            models=tuple(options.model),
            limits=KeyLimits(**{name: getattr(options, name) for name in KeyLimits.model_fields}),
            expires=_time(options.expires),
        )
    except ValidationError as error:
        fault = error.errors()[0]
        raise StartupError(f"{field_path(fault['loc'])} = {fault['input']!r}: {fault['msg']}") from error
    with edited(path) as entries:
        if any(other.name == entry.name for other in entries):
            raise StartupError(f"there is a key {entry.name!r} in {path} already; names are used once")
        entries.append(entry)
    print(key)
    print(f"Added {entry.name!r} to {path}. The key is not shown again.", file=sys.stderr)
    return 0


def _time(text: str | None) -> datetime | date | None:
    """`30d` from now; when a day ends is for `KeyEntry` to say."""
    if text is None:
        return None
    if match := re.fullmatch(r"(\d{1,5})([hdw])", text):
        return (datetime.now(UTC) + timedelta(**{_UNITS[match[2]]: int(match[1])})).replace(microsecond=0)
    try:
        return date.fromisoformat(text) if len(text) <= len("2027-01-31") else datetime.fromisoformat(text)
    except ValueError as error:
        raise StartupError(f"--expires {text}: write 2027-01-31, or 12h, 30d or 8w from now") from error


def _list(options: argparse.Namespace) -> int:
    _table([_row(entry) for entry in read_keys(_file(options))])
    return 0


def _row(entry: KeyEntry) -> dict[str, str]:
    limits = entry.limits.model_dump(exclude_none=True)
    return {
        "NAME": entry.name,
        "STATE": _state(entry),
        "SCOPES": ",".join(entry.scopes),
        "MODELS": ",".join(entry.models) or "all",
        "EXPIRES": f"{entry.expires:%Y-%m-%d %H:%M} UTC" if entry.expires else "never",
        "LIMITS": " ".join(f"{name}={value}" for name, value in limits.items()) or "the server's",
    }


def _state(entry: KeyEntry) -> str:
    if entry.disabled:
        return "revoked"
    return "expired" if entry.expires and entry.expires <= datetime.now(UTC) else "active"


def _revoke(options: argparse.Namespace) -> int:
    path = _file(options)
    with edited(path) as entries:
        for index, entry in enumerate(entries):
            if entry.name == options.name:
                entries[index] = entry.model_copy(update={"disabled": True})
                break
        else:
            raise StartupError(f"there is no key {options.name!r} in {path}")
    print(f"Revoked {options.name!r}.", file=sys.stderr)
    return 0


def _verify(options: argparse.Namespace) -> int:
    entries = read_keys(_file(options))
    # Not as an argument, which every user of this machine could read, and the shell would remember.
    key = (getpass.getpass("Key: ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
    digest = digest_of(key).hex()
    entry = next((entry for entry in entries if secrets.compare_digest(entry.sha256, digest)), None)
    if entry is None:
        raise StartupError("no key of the file is this one")
    _table([_row(entry)])
    return 0 if _state(entry) == "active" else 1


def _usage(options: argparse.Namespace) -> int:
    server = load_with_sources(config=options.config)[0].server
    url = (options.url or server.local_url).rstrip("/").removesuffix("/v1")
    request = urllib.request.Request(f"{url}/admin/usage?days={options.days}")
    if key := os.environ.get("OPENAI_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            rows = json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode("utf8", "replace")
        hint = " (OPENAI_API_KEY holds the key to send)" if error.code in (401, 403) else ""
        raise StartupError(f"{url} answered {error.code}{hint}: {_message(text)}") from error
    except (OSError, ValueError, KeyError) as error:
        raise StartupError(f"{url} cannot be asked: {getattr(error, 'reason', error)}") from error
    _table(
        [
            {
                "DATE": row["date"],
                "KEY": row["key"] or "(none)",
                "REQUESTS": f"{row['requests']:,}",
                "PROMPT TOKENS": f"{row['prompt_tokens']:,}",
                "COMPLETION TOKENS": f"{row['completion_tokens']:,}",
            }
            for row in rows
        ]
    )
    return 0


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _table(rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    if not rows:
        print("(none)", file=sys.stderr)
        return
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in (dict(zip(widths, widths, strict=True)), *rows):
        print("  ".join(f"{row[name]:<{width}}" for name, width in widths.items()).rstrip())

"""API keys: where they come from, and whose a key is.

A key is stored and compared as its SHA-256 digest. That is enough for keys made here, which have 256 random
bits; a password would need a slow hash.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from .clients import Client, Quotas
from .errors import StartupError, Unauthenticated
from .key_file import KeyEntry, KeyFileError, read_keys
from .periodic import every
from .settings import SecuritySettings

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.4
_SHORT_KEY = 16


@dataclass(frozen=True, slots=True)
class _Key:
    digest: bytes
    client: Client
    expires: float | None
    disabled: bool


class ApiKeys:
    """The keys of the settings and of the keys' file. Raises `StartupError` when the file cannot be used."""

    def __init__(self, settings: SecuritySettings) -> None:
        self._file = settings.api_keys_file
        self._quotas = settings.quotas
        self._listed = [_listed_key(key.get_secret_value(), settings.quotas) for key in settings.api_keys]
        # Looked up by a hash with a secret of this process: how long a look-up takes then says nothing about
        # the keys, with ten of them or ten thousand (CVE-2025-59425 is what `==` over the keys leads to).
        self._pepper = secrets.token_bytes(32)
        self._nobody = _Key(secrets.token_bytes(32), Client("nobody"), None, True)
        self._keys: dict[bytes, _Key] = {}
        self._version = self._seen = _version(self._file)
        try:
            self._use(read_keys(self._file) if self._file else ())
        except KeyFileError as error:
            raise StartupError(str(error)) from error

    def __len__(self) -> int:
        return len(self._keys)

    def authenticate(self, key: str) -> Client:
        """Whose key it is. Raises `Unauthenticated`."""
        digest = digest_of(key)
        found = self._keys.get(self._blinded(digest), self._nobody)
        if not secrets.compare_digest(found.digest, digest):
            raise Unauthenticated("Incorrect API key provided. Ask this server's operator for one.")
        if found.disabled:
            raise Unauthenticated("This API key has been revoked.")
        if found.expires is not None and time.time() >= found.expires:
            raise Unauthenticated("This API key has expired.")
        return found.client

    def watched(self) -> AbstractAsyncContextManager[None]:
        """Within it edits of the file take effect."""
        return every(_POLL_SECONDS, self._look) if self._file else nullcontext()

    async def _look(self) -> None:
        assert self._file is not None
        before, self._seen = self._seen, await asyncio.to_thread(_version, self._file)
        if self._seen == self._version or self._seen != before:  # not while an editor may still be writing
            return
        self._version = self._seen
        try:
            entries = await asyncio.to_thread(read_keys, self._file)
            self._use(entries)
        except KeyFileError as error:
            logger.error("%s. The keys read before stay in use", error)
        else:
            logger.info("%s: %d keys", self._file, len(entries))

    def _use(self, entries: Iterable[KeyEntry]) -> None:
        keys = [*self._listed, *(_file_key(entry, self._quotas) for entry in entries)]
        self._keys = {self._blinded(key.digest): key for key in keys}

    def _blinded(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._pepper, digest_size=16).digest()


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf8", "surrogateescape")).digest()


def _listed_key(key: str, quotas: Quotas) -> _Key:
    """A key of the comma list is named by the start of its digest, which stays when the list changes."""
    digest = digest_of(key)
    name = f"key-{digest.hex()[:8]}"
    if len(key) < _SHORT_KEY:
        logger.warning("The API key %s has only %d characters and could be guessed", name, len(key))
    return _Key(digest, Client(f"key:{name}", name, quotas=quotas), None, False)


def _file_key(entry: KeyEntry, defaults: Quotas) -> _Key:
    client = Client(
        f"key:{entry.name}",
        entry.name,
        frozenset(entry.scopes),
        frozenset(entry.models),
        entry.limits.over(defaults),
        entry.weight,
        entry.priority,
    )
    expires = entry.expires.timestamp() if entry.expires else None
    return _Key(bytes.fromhex(entry.sha256), client, expires, entry.disabled)


def _version(path: Path | None) -> tuple[int, ...] | None:
    """Changes whenever the file does, also when a Kubernetes volume swaps the link that it is."""
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    # Not the time of its content, which some copy along, and which a change of who may read it leaves.
    return found and (found.st_ctime_ns, found.st_size, found.st_ino)

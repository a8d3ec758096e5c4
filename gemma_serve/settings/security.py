"""Who may use the server, from where, and how much."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator

from ..clients import Quotas
from .base import Names, Secrets, Section


class SecuritySettings(Section):
    api_key_required: bool | None = None
    """Refuse requests without a valid API key; by default when there are keys."""
    api_keys: Secrets = ()
    """Keys that may generate, separated by commas. A file has more: names, scopes, limits, expiry."""
    api_keys_file: Path | None = None
    """YAML file of keys, managed by `gemma-server keys`; edits take effect within 2 s."""
    public_paths: Names = (
        "/",
        "/assets/*",
        "/health",
        "/health/live",
        "/health/ready",
        "/docs",
        "/docs/assets/*",
        "/openapi.json",
    )
    """Paths that can be read without a key; `/*` at the end for all below."""
    trusted_proxies: Names = ()
    """Addresses or networks of proxies whose `X-Forwarded-For` is believed, such as `10.0.0.0/8`."""
    rate_limit_per_minute: int = Field(default=0, ge=0)
    """Requests per minute of each key, or of each address where there is none; 0 is no limit."""
    rate_limit_window_seconds: int = Field(default=60, ge=1, le=3600)
    """Over how long that rate is counted: a shorter window allows smaller bursts."""
    tokens_per_minute: int = Field(default=0, ge=0)
    """Tokens, of prompts and answers, per minute and client; 0 is no limit."""
    tokens_per_day: int = Field(default=0, ge=0)
    """Tokens per UTC day and client; 0 is no limit."""
    max_in_flight: int = Field(default=0, ge=0)
    """Requests of one client at the same time; 0 is no limit."""
    allowed_origins: Names = ()
    """Origins whose pages may call the API from a browser (CORS), such as `https://app.example.com`."""

    block_after_failures: int = Field(default=20, ge=0)
    """Wrong keys from one address within the window that block it for a while; 0 is never."""
    block_after_limit_hits: int = Field(default=0, ge=0)
    """Requests over its limit within the window that block a key or address for a while; 0 is never."""
    block_window_seconds: int = Field(default=60, ge=1)
    """The window in which those are counted."""
    block_seconds: float = Field(default=60, gt=0)
    """Length of a client's first block; each further one within a day is twice as long."""
    block_max_seconds: float = Field(default=3600, gt=0)
    """Length of the longest block."""
    trusted_hosts: Names = ()
    """Host names that the server answers to, `*.example.com` for all below; by default any."""
    allowed_methods: Names = ("GET", "POST", "DELETE", "OPTIONS")
    """Methods that pages of those origins may use."""
    allowed_headers: Names = ("*",)
    """Headers that pages of those origins may send."""
    allow_credentials: bool = False
    """Let browsers send cookies and client certificates along; not with `*` as origin."""

    @property
    def quotas(self) -> Quotas:
        """What a client may take of which nothing else is said."""
        return Quotas(
            self.rate_limit_per_minute, self.tokens_per_minute, self.tokens_per_day, self.max_in_flight
        )

    @property
    def keys_required(self) -> bool:
        if self.api_key_required is None:
            return bool(self.api_keys or self.api_keys_file)
        return self.api_key_required

    @model_validator(mode="after")
    def _keys_to_require(self) -> Self:
        if self.api_key_required and not (self.api_keys or self.api_keys_file):
            raise ValueError(
                "security.api_key_required: there are no keys, so nobody could get in; set security.api_keys "
                "or security.api_keys_file (`gemma-server keys create NAME --file keys.yaml` makes one)"
            )
        return self

    @model_validator(mode="after")
    def _credentials(self) -> Self:
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ValueError(
                "security.allow_credentials: with '*' in security.allowed_origins any page could act for "
                "whoever visits it; name the origins"
            )
        return self

    @field_validator("api_keys")
    @classmethod
    def _that_can_be_sent(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for number, key in enumerate(value, 1):
            text = key.get_secret_value()
            if not text or text != text.strip():
                fault = "has blanks around it" if text.strip() else "is empty"
                raise ValueError(f"key {number} of {len(value)} {fault}; leave that out")
        return value

    @field_validator("public_paths")
    @classmethod
    def _paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            if not path.startswith("/") or "*" in path.removesuffix("/*"):
                raise ValueError(f"{path!r} is not a path such as /docs or /docs/assets/*")
            if path == "/*" or path.startswith("/admin"):
                raise ValueError(f"{path!r} must not be public")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"{network!r} is not an address or network: {error}") from None
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s,*]+", origin):
                raise ValueError(f"{origin!r} is not an origin: write scheme://host[:port], without a path")
        return value

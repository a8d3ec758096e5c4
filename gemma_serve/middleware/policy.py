"""Which paths are public, exempt from limits, or need more than the inference scope: decided in one place.

Only `scope["path"]` counts, which is what the router matches; a URL rebuilt from the Host header is the
client's to choose (CVE-2026-48746). Whatever is not named here needs a key (vllm#42591 is what a list of
protected prefixes leads to).
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import Scope

from .. import clients


class Policy:
    def __init__(self, public_paths: Iterable[str]) -> None:
        paths = list(public_paths)
        self._public = frozenset(path for path in paths if not path.endswith("/*"))
        self._public_below = tuple(path.removesuffix("*") for path in paths if path.endswith("/*"))

    def is_public(self, scope: Scope) -> bool:
        """May it be read without a key?"""
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return False
        path: str = scope["path"]
        if path in self._public:
            return True
        # "/docs/assets/../../v1/models" begins with a public path.
        return path.startswith(self._public_below) and not {"", ".", ".."} & set(path[1:].split("/"))

    def is_exempt(self, scope: Scope) -> bool:
        """Is it left alone by limits, and by blocks unless a key is sent? Polling must never be refused."""
        path: str = scope["path"]
        return path == "/metrics" or path == "/health" or path.startswith("/health/") or self.is_public(scope)

    @staticmethod
    def scope_needed(scope: Scope) -> clients.Scope | None:
        """None: any key will do."""
        path: str = scope["path"]
        if path.startswith("/v1/models/") and scope.get("method") not in ("GET", "HEAD", "OPTIONS"):
            return "admin"
        if path == "/admin" or path.startswith("/admin/") or path == "/v1/cache":
            return "admin"
        if path.startswith("/health/"):
            return None
        return "metrics" if path == "/metrics" else "inference"

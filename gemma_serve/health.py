"""Which state the server is in, for probes and people."""

from __future__ import annotations

from typing import Any

from .engine.base import Engine


class Health:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def live(self) -> bool:
        """False only when a restart of this process would help."""
        return not self._engine.status.failed

    def ready(self) -> bool:
        """Would a request sent now be served?"""
        return self._engine.status.ready

    def summary(self) -> dict[str, Any]:
        status = self._engine.status
        body: dict[str, Any] = {"status": str(status.state)}
        if status.phase:
            body["phase"] = status.phase
        if status.error:
            body["reason"] = status.error
        return body

"""Which state the server is in, for probes and people."""

from __future__ import annotations

from typing import Any

from .drain import Drain
from .engine.base import Engine


class Health:
    def __init__(self, engine: Engine, drain: Drain) -> None:
        self._engine = engine
        self._drain = drain

    def live(self) -> bool:
        """False only when a restart of this process would help."""
        return not self._engine.status.failed

    def ready(self) -> bool:
        """Would a request sent now be served?"""
        return self._engine.status.ready and not self._drain.begun

    def summary(self) -> dict[str, Any]:
        status = self._engine.status
        if self._drain.begun:
            return {"status": "draining", "reason": f"the server ends; {self._drain.active} requests run"}
        body: dict[str, Any] = {"status": str(status.state)}
        if status.phase:
            body["phase"] = status.phase
        if status.error:
            body["reason"] = status.error
        return body

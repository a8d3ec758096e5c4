"""How often and how soon a dead engine is started again."""

from __future__ import annotations

import time
from collections import deque

from ..settings import SupervisorSettings

_LONGEST_WAIT_SECONDS = 30.0


class Restarts:
    """Counts the starts of the last while: each waits longer than the one before, and there is a limit.

    As many in a row that fail are too many, however long each of them takes.
    """

    def __init__(self, settings: SupervisorSettings) -> None:
        self._settings = settings
        self._starts: deque[float] = deque()
        self._in_vain = 0

    def next_wait(self) -> float | None:
        """Seconds to wait before the next start, which is counted; None when there may be no further one."""
        now = time.monotonic()
        while self._starts and now - self._starts[0] > self._settings.restart_window_seconds:
            self._starts.popleft()
        if max(len(self._starts), self._in_vain) >= self._settings.max_restarts:
            return None
        self._starts.append(now)
        self._in_vain += 1
        recent = len(self._starts) - 1
        return 0.0 if recent == 0 else min(_LONGEST_WAIT_SECONDS, 0.5 * 2.0 ** (recent - 1))

    def succeeded(self) -> None:
        """The engine works again."""
        self._in_vain = 0

    def spent(self) -> str:
        settings = self._settings
        if not settings.max_restarts:
            return "it is not started again (supervisor.max_restarts=0)"
        times, window = settings.max_restarts, settings.restart_window_seconds
        if self._in_vain >= times:
            return f"it was started again {times} times in vain (supervisor.max_restarts)"
        return f"it was started again {times} times within {window:.0f} s (supervisor.max_restarts)"

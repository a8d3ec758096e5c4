"""How long a client may take to read."""

from __future__ import annotations

import asyncio

from ..settings import ServerSettings

_LEAST_READ = 65_536  # bytes in that time: one who takes less would hold a place in the engine for ever


class PatientOnce:
    """Ends a connection whose other end does not read, and with it the generation that it was for."""

    limits: ServerSettings
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _write_timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._stop_write_timer()
        self._expect_reading()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()  # type: ignore[misc]

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_write_timer()
        super().connection_lost(exc)  # type: ignore[misc]

    def _expect_reading(self) -> None:
        unread, seconds = self.transport.get_write_buffer_size(), self.limits.write_timeout_seconds
        self._write_timer = self.loop.call_later(seconds, self._check_reading, unread)

    def _check_reading(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() <= unread - _LEAST_READ:
            self._expect_reading()  # a large answer over a slow line
        else:
            self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

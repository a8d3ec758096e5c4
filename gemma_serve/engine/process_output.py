"""What vLLM's processes write to stderr past the logging module, brought into our log's format."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("gemma_serve.engine")

_OURS = re.compile(rb'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - [A-Z]+ - |\{"time":"')
_LINE_END = re.compile(rb"[\r\n]")
_PROGRESS_SECONDS = 1.0


# An exception's last line, as vLLM's processes log it, and those that only point to another one.
_EXCEPTION = re.compile(r"(?:^|\] |\\n|\")((?:\w+\.)*\w*(?:Error|Exception)): ((?:[^\"\\]|\\[^n])+)")
_SECONDARY = re.compile(r"root cause|background process|stack trace")


class EngineOutput:
    """What the processes have said of their failures."""

    def __init__(self) -> None:
        self._exceptions: deque[str] = deque(maxlen=20)

    def note(self, line: str) -> None:
        for name, message in _EXCEPTION.findall(line):
            if not _SECONDARY.search(message):
                self._exceptions.append(f"{name}: {message.strip()}")

    def root_cause(self) -> str | None:
        """The last exception that does not merely report another."""
        return self._exceptions[-1] if self._exceptions else None


@contextmanager
def formatted_stderr() -> Iterator[EngineOutput]:
    """Processes started inside get a pipe for stderr: C++ warnings, progress bars, prints become log lines.

    This process has its own stderr back afterwards, so that what it says in a crash is not lost in the pipe.
    """
    reader, writer = os.pipe()
    stderr = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)
    output = EngineOutput()
    arguments = (reader, stderr, output)
    threading.Thread(target=_forward, args=arguments, name="engine-stderr", daemon=True).start()
    try:
        yield output
    finally:
        os.dup2(stderr, 2)


def _forward(reader: int, stderr: int, output: EngineOutput) -> None:
    """Pass lines of our format on as they are and log the others, until the last process has ended."""
    last_progress = 0.0
    pending = b""
    while data := os.read(reader, 65536):
        pending += data
        while end := _LINE_END.search(pending):
            line, pending = pending[: end.start()].rstrip(), pending[end.end() :]
            output.note(line.decode(errors="replace"))
            if _OURS.match(line):
                os.write(stderr, line + b"\n")
                continue
            if end[0] == b"\r":  # a progress bar paints itself anew many times a second
                if time.monotonic() - last_progress < _PROGRESS_SECONDS:
                    continue
                last_progress = time.monotonic()
            if line:
                logger.info("[engine] %s", line.decode(errors="replace"))
    os.close(reader)
    os.close(stderr)

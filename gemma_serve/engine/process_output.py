"""What vLLM's processes write to stderr past the logging module, brought into our log's format."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("gemma_serve.engine")

_OURS = re.compile(rb'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - [A-Z]+ - |\{"time":"')
_LINE_END = re.compile(rb"[\r\n]")
_PROGRESS_SECONDS = 1.0


@contextmanager
def formatted_stderr() -> Iterator[None]:
    """Processes started inside get a pipe for stderr: C++ warnings, progress bars, prints become log lines.

    This process has its own stderr back afterwards, so that what it says in a crash is not lost in the pipe.
    """
    reader, writer = os.pipe()
    stderr = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)
    threading.Thread(target=_forward, args=(reader, stderr), name="engine-stderr", daemon=True).start()
    try:
        yield
    finally:
        os.dup2(stderr, 2)


def _forward(reader: int, stderr: int) -> None:
    """Pass lines of our format on as they are and log the others, until the last process has ended."""
    last_progress = 0.0
    pending = b""
    while data := os.read(reader, 65536):
        pending += data
        while end := _LINE_END.search(pending):
            line, pending = pending[: end.start()].rstrip(), pending[end.end() :]
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

"""What vLLM's processes write to stderr past the logging module, brought into our log's format."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .. import logs
from .load_progress import Progress, progress_of

_OURS = re.compile(rb'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - [A-Z]+ - |\{"time":"')
_LINE_END = re.compile(rb"(\r|\n)")
_LONGEST_LINE = 65536
_PROGRESS_SECONDS = 1.0

# An exception's last line, as vLLM's processes log it, and those that only point to another one.
_EXCEPTION = re.compile(r"(?:^|\] |\| |\\n|\")((?:\w+\.)*\w*(?:Error|Exception)): ((?:[^\"\\]|\\[^n])+)")
_SECONDARY = re.compile(r"root cause|background process|stack trace|^cancelled$")
# A worker that a signal ends has no exception to tell.
_WORKER_DIED = re.compile(r"Worker proc (\S+) died unexpectedly \(exit code: -(\d+)\)")

_FAILED_CORE = re.compile(r"Failed core proc\(s\): \{'(\w+)': -(\d+)")


def _ignore(progress: Progress) -> None:
    pass


@contextmanager
def formatted_stderr(on_progress: Callable[[Progress], None] = _ignore) -> Iterator[EngineOutput]:
    """Processes started inside get a pipe for stderr: C++ warnings, progress bars, prints become log lines.

    This process has its own stderr back afterwards, so that what it says in a crash is not lost in the pipe.
    Its log never goes through the pipe (`logs.configure`): whoever empties the pipe must not wait for it.
    """
    reader, writer = os.pipe()
    stderr = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)
    output = EngineOutput(stderr, on_progress)
    threading.Thread(target=output.forward, args=(reader,), name="engine-stderr", daemon=True).start()
    try:
        yield output
    finally:
        os.dup2(stderr, 2)
        # multiprocessing's resource tracker, once it was started inside, keeps the reader for good.
        output.on_progress = _ignore


class EngineOutput:
    """Passes lines on to the file descriptor `stderr`, and remembers what failed.

    `on_progress` hears how far a load is, in the thread that reads.
    """

    def __init__(self, stderr: int, on_progress: Callable[[Progress], None] = _ignore) -> None:
        self._stderr = stderr
        self.on_progress = on_progress
        self._exceptions: deque[str] = deque(maxlen=20)
        self._last_progress = 0.0
        self.worker_killed = False
        """Was one of the engine's workers ended by SIGKILL, as the kernel does when memory is short?"""
        self.ended = threading.Event()
        """Set when the last process has closed its end."""

    def forward(self, reader: int) -> None:
        """Read until the last process has ended, whatever happens to our own stderr."""
        pending = b""
        while data := os.read(reader, _LONGEST_LINE):
            *complete, pending = _LINE_END.split(pending + data)
            for line, end in zip(complete[::2], complete[1::2], strict=True):
                self._pass_on(line.rstrip(), end)
            if len(pending) > _LONGEST_LINE:
                self._pass_on(pending, b"\n")
                pending = b""
        self._pass_on(pending.rstrip(), b"\n")
        self.ended.set()
        os.close(reader)
        os.close(self._stderr)

    def _pass_on(self, line: bytes, end: bytes) -> None:
        if not line:
            return
        text = line.decode(errors="replace")
        for name, message in _EXCEPTION.findall(text):
            if not _SECONDARY.search(message):
                self._exceptions.append(f"{name}: {message.strip()}")
        if (died := _WORKER_DIED.search(text)) is not None:
            self._exceptions.append(_ended_by_signal(died[1], int(died[2])))
            self.worker_killed = int(died[2]) == signal.SIGKILL
        if (progress := progress_of(text)) is not None:
            self.on_progress(progress)
        if not _OURS.match(line):
            if end == b"\r":  # a progress bar paints itself anew many times a second
                if time.monotonic() - self._last_progress < _PROGRESS_SECONDS:
                    return
                self._last_progress = time.monotonic()
            line = logs.format_line("gemma_serve.engine", f"[engine] {text}").encode(errors="replace")
        with contextlib.suppress(OSError):  # whoever read our log has gone; the engine goes on
            os.write(self._stderr, line + b"\n")

    def root_cause(self) -> str | None:
        """The last exception, or death of a worker, that does not merely follow from another."""
        return self._exceptions[-1] if self._exceptions else None


def killed_core(error: str) -> str | None:
    """What `error`, vLLM's words for a start that failed, says of a signal that ended the engine."""
    found = _FAILED_CORE.search(error)
    return None if found is None else _ended_by_signal(found[1], int(found[2]))


def _ended_by_signal(process: str, number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hint = ": is the machine, or the container, short of memory?" if number == signal.SIGKILL else ""
    return f"the engine's process {process} was ended by {name}{hint}"

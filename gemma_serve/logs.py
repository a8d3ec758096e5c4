"""Log configuration: one line format for our lines, uvicorn's and vLLM's, in every process."""

from __future__ import annotations

import abc
import contextlib
import functools
import json
import logging
import os
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import orjson


@dataclass(slots=True)
class RequestRecord:
    """What the layers find out about one request, for its log line."""

    id: str
    model: str | None = None
    key: str | None = None
    """The name of the API key, never the key."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    time_to_first_token: float | None = None
    """Seconds from the validated request to the first text."""
    cache: Literal["hit", "miss", "bypass", "coalesced"] | None = None
    """What the response cache did; None where it has no part."""
    cache_age: int | None = None
    """Seconds since a hit was generated."""
    status: int = 499
    """Of the answer, once it has begun."""
    finished: bool = False
    """Has the whole answer been sent?"""
    trace_id: str | None = None
    """32 hexadecimal digits; None where no traces are sent."""
    overdue: bool = False
    """Has its time run out before its answer was made?"""

    @property
    def final_status(self) -> int:
        """The status, or nginx's 499 where the client left before the end of the answer."""
        return self.status if self.finished else 499


current_request: ContextVar[RequestRecord | None] = ContextVar("current_request", default=None)
"""The request being served; its id is on every JSON log line written while it is."""

_request_logger = logging.getLogger("gemma_serve.request")


def log_request(
    method: str, path: str, client: str, record: RequestRecord, seconds: float, level: int = logging.INFO
) -> None:
    """The line of a request that has ended: `POST /path - 192.0.2.1 - 200 - 1.234s`. `path` is printable."""
    if not _request_logger.isEnabledFor(level):
        return
    message = f"{method} {path} - {client} - {record.final_status} - {seconds:.3f}s"
    fields = {
        "method": method,
        "path": path,
        "client": client,
        "status": record.final_status,
        "seconds": round(seconds, 6),
        "model": record.model,
        "key": record.key,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "time_to_first_token": record.time_to_first_token,
        "cache": record.cache,
    }
    match logging.root.handlers:
        case [LineHandler() as handler]:  # ours alone: past logging's machinery, which costs 30 µs a line
            handler.write_line(time.time(), level, _request_logger.name, message, fields)
        case _:
            entry = logging.LogRecord(_request_logger.name, level, __file__, 0, message, None, None)
            entry.__dict__ |= fields
            _request_logger.handle(entry)


# The engine's processes start without our settings: they read these (see engine/logging.json).
_LEVEL_VARIABLE = "VLLM_LOGGING_LEVEL"
_FORMAT_VARIABLE = "GEMMA_SERVE_ENGINE_LOG_FORMAT"

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "vllm_process_name",
    "fileinfo",
}


class LineFormatter(logging.Formatter, abc.ABC):
    """Can also do without a `LogRecord`."""

    @abc.abstractmethod
    def line(self, at: float, level: str, logger: str, message: str, fields: dict[str, Any]) -> str: ...


class TextFormatter(LineFormatter):
    """`2026-01-31 12:00:00,123 - INFO - message`, on every line of a message that has several."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s - %(levelname)s - %(message)s")

    def line(self, at: float, level: str, logger: str, message: str, fields: dict[str, Any]) -> str:
        return f"{_local_second(int(at))},{int(at % 1 * 1000):03d} - {level} - {message}"

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if "\n" not in text:
            return text
        start = f"{record.asctime} - {record.levelname} - "
        first, *rest = text.split("\n")
        # The bar tells a line within a message from the start of one, which a message could otherwise forge.
        return "\n".join([first, *(f"{start}| {line}" for line in rest if line)])

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.name.startswith("vllm"):  # which of vLLM's processes speaks
            record.message = f"[{_process(record)}] {record.message}"
        return super().formatMessage(record)


class JsonFormatter(LineFormatter):
    """One JSON object a line; what a call passes as `extra` becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.name.startswith("vllm"):
            fields = {"process": _process(record)} | fields
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return self.line(record.created, record.levelname, record.name, record.getMessage(), fields)

    def line(self, at: float, level: str, logger: str, message: str, fields: dict[str, Any]) -> str:
        entry: dict[str, Any] = {
            "time": f"{_utc_second(int(at))}.{int(at % 1 * 1000):03d}Z",
            "level": level,
            "logger": logger,
            "message": message,
        }
        if (request := current_request.get()) is not None:
            entry["request_id"] = request.id
            if request.key is not None:
                entry["key"] = request.key
            if request.trace_id is not None:
                entry["trace_id"] = request.trace_id
        entry |= fields
        try:
            return orjson.dumps(entry, default=str).decode()
        except (TypeError, ValueError):  # lone surrogates, integers over 64 bits
            return json.dumps(entry, default=str)


@functools.lru_cache(maxsize=2)
def _utc_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


@functools.lru_cache(maxsize=2)
def _local_second(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


class LineHandler(logging.Handler):
    """Writes to a file descriptor of its own, which it keeps open, a line in one go."""

    def __init__(self, descriptor: int, formatter: LineFormatter) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._line = formatter.line
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record))
        except Exception:
            self.handleError(record)

    def write_line(self, at: float, level: int, logger: str, message: str, fields: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody reads the log: no reason to fail the request
            self._write(self._line(at, logging.getLevelName(level), logger, message, fields))

    def _write(self, line: str) -> None:
        data = line.encode("utf8", "backslashreplace") + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]


def _process(record: logging.LogRecord) -> str:
    return str(getattr(record, "vllm_process_name", None) or record.processName)


def _formatter(log_format: str) -> LineFormatter:
    return JsonFormatter() if log_format == "json" else TextFormatter()


def format_line(name: str, message: str) -> str:
    """An INFO line of logger `name` in the configured format, for who must not wait for the log's lock."""
    return _formatter(os.environ.get(_FORMAT_VARIABLE, "text")).line(time.time(), "INFO", name, message, {})


def configure(level: str, log_format: str) -> None:
    """Send every logger's lines to stderr in `log_format` ("text" or "json"), here and in the engine."""
    # A file descriptor of its own: while the engine starts, 2 is a pipe (engine/process_output.py).
    handler = LineHandler(os.dup(sys.stderr.fileno()), _formatter(log_format))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("gemma_serve").setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLevelName(level)))
    logging.getLogger("uvicorn.access").disabled = True  # middleware/request_log.py writes these
    logging.captureWarnings(True)
    os.environ[_LEVEL_VARIABLE] = level
    os.environ[_FORMAT_VARIABLE] = log_format


def adopt(prefix: str) -> None:
    """Send the lines of loggers below `prefix`, which brought handlers of their own, through ours."""
    for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == prefix]:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def engine_handler() -> logging.Handler:
    """The handler of vLLM's loggers, in each of vLLM's processes."""
    logging.getLogger("vllm").setLevel(os.environ.get(_LEVEL_VARIABLE, "INFO"))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(os.environ.get(_FORMAT_VARIABLE, "text")))
    return handler

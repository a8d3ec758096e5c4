"""Log configuration: one line format for our lines, uvicorn's and vLLM's, in every process."""

from __future__ import annotations

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
    # Not `logger.log`: finding out which line of code logs costs more than all else here.
    entry = logging.LogRecord(_request_logger.name, level, __file__, 0, message, None, None)
    entry.__dict__ |= {
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


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,123 - INFO - message`, on every line of a message that has several."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s - %(levelname)s - %(message)s")

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


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what a call passes as `extra` becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request := current_request.get()) is not None:
            entry["request_id"] = request.id
            if request.key is not None:
                entry["key"] = request.key
            if request.trace_id is not None:
                entry["trace_id"] = request.trace_id
        if record.name.startswith("vllm"):
            entry["process"] = _process(record)
        entry |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(entry, default=str).decode()
        except (TypeError, ValueError):  # lone surrogates, integers over 64 bits
            return json.dumps(entry, default=str)


def _process(record: logging.LogRecord) -> str:
    return str(getattr(record, "vllm_process_name", None) or record.processName)


def _formatter(log_format: str) -> logging.Formatter:
    return JsonFormatter() if log_format == "json" else TextFormatter()


def format_line(name: str, message: str) -> str:
    """An INFO line of logger `name` in the configured format, for who must not wait for the log's lock."""
    record = logging.LogRecord(name, logging.INFO, "", 0, message, None, None)
    return _formatter(os.environ.get(_FORMAT_VARIABLE, "text")).format(record)


def configure(level: str, log_format: str) -> None:
    """Send every logger's lines to stderr in `log_format` ("text" or "json"), here and in the engine."""
    # A file descriptor of its own: while the engine starts, 2 is a pipe (engine/process_output.py).
    handler = logging.StreamHandler(os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf8"))
    handler.setFormatter(_formatter(log_format))
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

"""vLLM's exceptions and error answers as ours: the one place that knows both."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pydantic
from jinja2 import TemplateError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from ..engine_fields import ENGINE_FIELDS
from ..errors import (
    BY_STATUS,
    ContextLengthExceeded,
    EngineDied,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    NotImplementedHere,
    Overloaded,
    ServeError,
    Unprocessable,
    field_path,
)
from . import vllm_names
from .vllm_names import ErrorResponse, sanitize_message

logger = logging.getLogger(__name__)

_FAILED = "The engine failed on this request; the server's log says why."

# vLLM raises these for what a client sent until all its checks have moved to VLLMClientError (its own
# create_error_response says so), so they are the client's fault here too.
_CLIENT_FAULTS = (ValueError, TypeError, OverflowError, TemplateError)


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Raise `ServeError` for whatever vLLM raises inside; cancellation passes."""
    try:
        yield
    except (ServeError, asyncio.CancelledError, GeneratorExit):
        raise
    except Exception as error:
        # What is told of its frames has been said; they know it, and the request.
        raise map_error(error) from error.with_traceback(None)


def map_error(error: BaseException) -> ServeError:
    """The `ServeError` that tells a client about a vLLM exception."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, EngineGenerateError) and error.__cause__ is not None:
        return map_error(error.__cause__)
    if isinstance(error, pydantic.ValidationError):
        return _validation_error(error)
    # VLLMValidationError's str() adds parameter and value; OverflowError's first argument is a number.
    message = _readable(error.args[0] if error.args and isinstance(error.args[0], str) else str(error))
    match error:
        case EngineDeadError():
            return EngineDied("The engine stopped while it worked on this request. Try again shortly.")
        case vllm_names.GracefulHTTPError():
            return _by_status(int(error.http_status), message, None)
        case vllm_names.VLLMUnprocessableEntityError():
            return Unprocessable(message, param=error.parameter)
        case vllm_names.VLLMNotFoundError():
            return NotFound(message)
        case vllm_names.VLLMValidationError():
            return _client_fault(message, error.parameter)
        case vllm_names.VLLMClientError():
            return _client_fault(message, None)
        case vllm_names.RetryableRequestError():
            return Overloaded(message)
        case NotImplementedError():
            return NotImplementedHere(message)
        case ImportError():  # sound, which the model takes, without a library that decodes it
            logger.warning("A request needs what is not installed: %s", message)
            return NotImplementedHere(f"What reads this is not installed on this server: {message}")
        case _ if isinstance(error, _CLIENT_FAULTS):
            return _client_fault(message, None)
    logger.error("The engine failed on a request", exc_info=error)
    return ServeError(_FAILED)


def raise_for_error(response: Any) -> None:
    """Raise what vLLM's serving classes return instead of raising."""
    if isinstance(response, ErrorResponse):
        info = response.error
        info.message = _readable(info.message)
        if info.code == 404 and info.param == "model":
            raise ModelNotFound(info.message, param="model")
        raise _by_status(info.code, info.message, info.param)


# vLLM's messages name its own flags; those not listed here are engine arguments.
_FLAGS = {
    "--enable-auto-tool-choice and --tool-call-parser": "the setting model.tool_parser",
    "--tool-call-parser": "the setting model.tool_parser",
    "--reasoning-parser and/or --reasoning-config": "the setting model.reasoning_parser",
    ", but --trust-request-chat-template is not set": "",
}


_FLAG = re.compile(r"--([a-z][a-z0-9-]+)")


def _engine_setting(flag: str, unchanged: str) -> str:
    name = flag.replace("-", "_")
    return f"engine.{name}" if name in ENGINE_FIELDS else unchanged


def _readable(message: str) -> str:
    for flag, setting in _FLAGS.items():
        message = message.replace(flag, setting)
    message = _FLAG.sub(lambda flag: _engine_setting(flag[1], flag[0]), message)
    return str(sanitize_message(message))


def _by_status(status: int, message: str, param: str | None) -> ServeError:
    if status == 503:
        return Overloaded(message)
    if status == 400:
        return _client_fault(message, param)
    if status in BY_STATUS:
        return BY_STATUS[status](message, param=param)
    logger.error("The engine answered %d: %s", status, message)
    return ServeError(_FAILED)  # vLLM's message is the text of some exception: "2" for a KeyError


def _client_fault(message: str, param: str | None) -> InvalidRequest:
    lowered = message.lower()
    if (
        "maximum context length" in lowered
        or "maximum model length" in lowered
        or "context length (" in lowered
    ):
        return ContextLengthExceeded(message)
    if "is not a multimodal model" in message:
        return InvalidRequest("This model takes text only: send no images, audio or video.", param="messages")
    return InvalidRequest(message, param=param)


def _validation_error(error: pydantic.ValidationError) -> InvalidRequest:
    """The first fault, which is the one to mend first, with the path of the field."""
    fault = error.errors(include_url=False, include_context=True)[0]
    cause = (fault.get("ctx") or {}).get("error")
    if isinstance(cause, vllm_names.VLLMClientError):
        mapped = map_error(cause)
        if isinstance(mapped, InvalidRequest):
            return mapped
    path = field_path(fault["loc"])
    message = str(fault["msg"]).removeprefix("Value error, ")
    return InvalidRequest(f"Invalid value for '{path}': {message}" if path else message, param=path or None)

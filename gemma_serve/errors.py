"""The error tree. Services raise these; `app.py` renders them in OpenAI's shape, in one place.

    ServeError                      500 server_error
    ├── EngineCrash                     engine_crash (the request itself makes the engine fail)
    ├── LoadFailed                      model_load_failed
    ├── InvalidRequest              400 invalid_request_error
    │   ├── ContextLengthExceeded       context_length_exceeded
    │   ├── Unprocessable           422 (an image that cannot be fetched, …)
    │   ├── Unauthenticated         401 invalid_api_key
    │   ├── PermissionDenied        403
    │   ├── NotFound                404
    │   │   └── ModelNotFound           model_not_found
    │   ├── MethodNotAllowed        405
    │   ├── RequestTimeout          408
    │   ├── Conflict                409
    │   ├── PayloadTooLarge         413
    │   ├── UnsupportedMediaType    415
    │   ├── HeadTooLarge            431
    │   └── NotImplementedHere      501
    ├── DeadlineExceeded            504 timeout
    ├── Unavailable                 503, Retry-After
    │   ├── EngineNotReady              engine_loading, engine_failed, engine_dead, engine_stopped
    │   ├── ModelNotLoaded              model_not_loaded
    │   ├── EngineDied                  engine_died (this request cannot go on)
    │   ├── Overloaded                  engine_overloaded
    │   ├── ShuttingDown                server_shutting_down
    │   └── StorageAway                 storage_unavailable (storage.py)
    └── RateLimited                 429 rate_limit_exceeded, Retry-After

`type` and `code` follow https://platform.openai.com/docs/guides/error-codes: clients branch on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# A client's own text may be quoted, and may have any length.
_LONGEST_MESSAGE = 1000
_LONGEST_PARAM = 200


# https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ServeError(Exception):
    """An error that a client may see. `message` says what to do about it; `param` names the field."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}…"
        self.param = param if param is None else param[:_LONGEST_PARAM]
        if code is not None:
            self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The wire form: `{"error": {message, type, param, code}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """The same in Anthropic's form."""
        by_class = "invalid_request_error" if self.status < 500 else "api_error"
        name = _ANTHROPIC_TYPES.get(self.status, by_class)
        return {"type": "error", "error": {"type": name, "message": self.message}}


class EngineCrash(ServeError):
    code = "engine_crash"


class LoadFailed(ServeError):
    """A model could not be loaded."""

    code = "model_load_failed"


class InvalidRequest(ServeError):
    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class HeadTooLarge(InvalidRequest):
    status = 431
    code = "request_head_too_large"


class RequestTimeout(InvalidRequest):
    status = 408
    code = "request_timeout"


class Conflict(InvalidRequest):
    status = 409


class Unprocessable(InvalidRequest):
    status = 422


class Unauthenticated(InvalidRequest):
    status = 401
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"})


class PermissionDenied(InvalidRequest):
    status = 403
    code = "permission_denied"


class NotFound(InvalidRequest):
    status = 404


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"


class PayloadTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class UnsupportedMediaType(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class NotImplementedHere(InvalidRequest):
    status = 501
    code = "not_implemented"


class Unavailable(ServeError):
    """Try again: `retry_after` is in seconds."""

    status = 503
    type = "service_unavailable"

    def __init__(self, message: str, *, retry_after: int = 5, code: str | None = None) -> None:
        super().__init__(message, code=code, headers={"Retry-After": str(retry_after)})


class RateLimited(ServeError):
    """Too much of `kind`, "requests" or "tokens". `retry_after` is in seconds; None: never as it is."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, kind: str, retry_after: float | None) -> None:
        headers = {"x-should-retry": "false"}  # OpenAI's clients obey it
        if retry_after is not None:
            headers = {"Retry-After": str(max(1, math.ceil(retry_after)))}
        super().__init__(message, headers=headers)
        self.type = kind


class EngineNotReady(Unavailable):
    """`code` names the engine's state."""


class ModelNotLoaded(Unavailable):
    code = "model_not_loaded"


class Overloaded(Unavailable):
    code = "engine_overloaded"


class ShuttingDown(Unavailable):
    code = "server_shutting_down"


class DeadlineExceeded(ServeError):
    status = 504
    type = "timeout"
    code = "deadline_exceeded"


class EngineDied(Unavailable):
    code = "engine_died"


def field_path(location: tuple[int | str, ...]) -> str:
    """Where in the request's body pydantic found a fault, as OpenAI writes it: `messages[0].content`."""
    if len(location) > 1 and str(location[0])[:1].isupper():
        location = location[1:]  # the class, where the body may be of several
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _UNION_BRANCHES or "[" in part:
            break  # pydantic names the branch of a union; the client knows only the field
        else:
            path += f".{part}"
    return path.lstrip(".")


_UNION_BRANCHES = {"str", "int", "float", "bool", "constrained-int", "list", "dict"}


class StartupError(Exception):
    """The server cannot start or go on; `str()` is one sentence for the operator."""


BY_STATUS: Mapping[int, type[ServeError]] = {
    400: InvalidRequest,
    404: NotFound,
    405: MethodNotAllowed,
    413: PayloadTooLarge,
    415: UnsupportedMediaType,
    422: Unprocessable,
    501: NotImplementedHere,
}

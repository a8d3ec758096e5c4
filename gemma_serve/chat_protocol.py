"""The messages of the WebSocket chat: what a client may send, and how the server's are written.

README has the whole protocol. Nothing here knows how a message travels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from .errors import ServeError

SUBPROTOCOL = "gemma-chat"

LONGEST_ID = 64
"""Of a client's message, in characters."""

GOING_AWAY = 1001
POLICY_VIOLATION = 1008
SERVER_FAILED = 1011


class Data(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Nothing(Data):
    """Of the types that need no data."""


class Sampling(Data):
    """Parameters of an answer, as of `POST /v1/chat/completions`, which checks their values."""

    model: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    length_penalty: Any = None
    logit_bias: Any = None
    bad_words: Any = None
    seed: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    reasoning_effort: Any = None
    chat_template_kwargs: Any = None

    def parameters(self) -> dict[str, Any]:
        """Those that were given."""
        return self.model_dump(include=set(Sampling.model_fields), exclude_none=True)


class Regenerate(Sampling):
    stream: bool = True


class Chat(Regenerate):
    message: Annotated[str, Field(min_length=1)]
    keep: Annotated[int, Field(ge=0)] | None = None
    """How many messages of the history stay; the question comes after them."""


class System(Data):
    message: str | None = None


class ChatMessage(Data):
    role: Literal["user", "assistant"]
    content: str


class Load(Data):
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)]
    system: str | None = None


class Resume(Data):
    session_id: str | None = None


class Envelope(Data):
    type: str
    id: Annotated[str, Field(max_length=LONGEST_ID)] | None = None
    data: dict[str, Any] | None = None


REQUESTS: dict[str, type[Data]] = {
    "chat": Chat,
    "regenerate": Regenerate,
    "cancel": Nothing,
    "system": System,
    "history": Nothing,
    "load": Load,
    "clear": Nothing,
    "session": Resume,
    "ping": Nothing,
}
"""What a client may send, and with what data."""


def message(kind: str, session_id: str, message_id: str | None, data: dict[str, Any]) -> bytes:
    """One of the server's messages."""
    return orjson.dumps({"type": kind, "session_id": session_id, "id": message_id, "data": data})


def token_head(session_id: str, message_id: str | None, field: str = "text") -> bytes:
    """A `token` up to its text, which is the only part that changes; `token` ends it."""
    start = message("token", session_id, message_id, {})
    return start[:-2] + b'"' + field.encode() + b'":'


def token(head: bytes, text: str) -> bytes:
    return b"%b%b}}" % (head, orjson.dumps(text))


def error_data(error: ServeError) -> dict[str, Any]:
    """The data of an `error`: as over HTTP, with what is a status and a header there."""
    after = error.headers.get("Retry-After")
    return {
        **error.body()["error"],
        "status": error.status,
        "retry_after": None if after is None else int(after),
    }

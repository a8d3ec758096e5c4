"""The wire, documented and validated. What only the engine understands passes through (`extra="allow"`)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

T = TypeVar("T")
# One fault is told: collecting those of a million items would take minutes and gigabytes.
Many = Annotated[list[T], Field(fail_fast=True)]
Token = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class Schema(BaseModel):
    # Strict: OpenAI refuses "0.5" for a number, and a silent conversion hides a client's bug.
    model_config = ConfigDict(
        extra="allow", strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )


def _at_most(most: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"should have at most {most} entries")
        return value

    return BeforeValidator(check)


class StreamOptions(Schema):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    """Send a last chunk with the token counts."""
    continuous_usage_stats: bool | None = None
    """Send the counts so far with every chunk (vLLM)."""
    include_obfuscation: bool | None = None
    """Accepted: nothing is added to hide the lengths of tokens."""


class ContentPart(Schema):
    type: Literal[
        "text",
        "input_text",
        "output_text",
        "refusal",
        "thinking",
        "image_url",
        "input_image",
        "image_embeds",
        "audio_url",
        "input_audio",
        "audio_embeds",
        "video_url",
    ]
    text: str | None = None
    image_url: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _what_the_type_needs(self) -> Self:
        if self.text is None and self.type.endswith("text"):
            raise ValueError("a text part needs 'text'")
        if self.image_url is None and self.type in ("image_url", "input_image"):
            raise ValueError("an image part needs 'image_url'")
        return self


class Function(Schema):
    name: str
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(Schema):
    id: str
    type: Literal["function"]
    function: Function


class ToolDefinition(Schema):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""


class Tool(Schema):
    type: Literal["function"]
    function: ToolDefinition


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]


class Message(Schema):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | Many[ContentPart] | None = None
    """Text, or parts such as `{"type": "text", "text": "…"}`."""
    name: str | None = None
    tool_calls: Many[ToolCall] | None = None
    """Of an assistant's message: the calls it made."""
    tool_call_id: str | None = None
    """Of a tool's message: the call it answers."""

    @model_validator(mode="after")
    def _content_where_needed(self) -> Self:
        if self.content is None and self.role not in ("assistant", "function"):
            raise ValueError(f"a {self.role} message needs content")
        return self


class GenerationBody(Schema):
    """What chat and completions share."""

    model: str | None = None
    """A served model's name or alias; may be left out where there is only one."""
    stream: bool | None = None
    """Send the answer as server-sent events while it is written."""
    stream_options: Annotated[StreamOptions | None, _at_most(16)] = None
    n: Positive | None = None
    """How many answers."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, _at_most(1024)] = None
    """Token id → bias added to its logit."""
    seed: Int64 | None = None
    """Same seed, same request: same answer, as far as the engine's batching allows."""
    stop: str | Many[str] | None = None
    """Where to end the answer, by default up to four texts; not part of it."""
    user: str | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Sample among the k likeliest tokens; 0 or -1 for all (vLLM)."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Sample among tokens at least this likely, relative to the likeliest (vLLM)."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Token | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    ignore_eos: bool | None = None
    """Go on until the token limit (vLLM; for benchmarks)."""
    prompt_logprobs: int | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    """Names the request in the engine and in the answer's id (vLLM); by default its `X-Request-Id`."""


class ChatCompletionBody(GenerationBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "gemma-demo",
                    "messages": [{"role": "user", "content": "Hello!"}],
                    "max_tokens": 64,
                    "stream": False,
                }
            ]
        }
    )

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: Positive | None = None
    """Most tokens of the answer; by default what the context leaves."""
    max_completion_tokens: Positive | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=-1)] | None = None
    response_format: ResponseFormat | None = None
    """`{"type": "json_object"}`, or a `json_schema` the answer must follow."""
    tools: Many[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class CompletionBody(GenerationBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "gemma-demo", "prompt": "Once upon a time", "max_tokens": 32}]
        }
    )

    prompt: str | Many[str] | Many[Token] | Many[Many[Token]] | None = None
    """Text, several texts, token ids, or several lists of them."""
    max_tokens: Token | None = None
    """Most tokens of the answer; 16 by default, as at OpenAI."""
    logprobs: Annotated[int, Field(ge=-1)] | None = None
    """How many of the likeliest tokens to report at each position."""
    echo: bool | None = None
    """Repeat the prompt before the answer."""
    suffix: str | None = None
    """Not supported: Gemma does not fill in the middle."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The answer; streamed as `chat.completion.chunk` events when `stream` is true."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    """Of an adapter, the model that it changes."""
    max_model_len: int | None
    """Context length in tokens."""
    aliases: list[str]
    family: str | None
    """Such as `Gemma 3`; null before it has been loaded."""
    modalities: list[str] | None
    """What it takes: `text`, `image`, `audio`; likewise."""
    state: str
    error: str | None
    """Why its last load failed."""


class AdapterBody(Schema):
    name: str = Field(pattern=r"^[\w.:-]{1,200}$")
    """What clients call it."""
    path: str = Field(min_length=1, max_length=1000)
    """A folder on the server, or a Hugging Face id."""


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class DayUsage(BaseModel):
    date: str
    key: str | None
    """The name of the key; null for all clients without one."""
    requests: int
    prompt_tokens: int
    completion_tokens: int


class UsageList(BaseModel):
    object: Literal["list"]
    data: list[DayUsage]


class Block(BaseModel):
    client: str
    """`ip:` and an address or network, or `key:` and a name."""
    reason: Literal["authentication", "limit"]
    offence: int
    """The how-many-th block of this client within a day; each is twice as long as the last."""
    until: datetime


class BlockList(BaseModel):
    object: Literal["list"]
    data: list[Block]


class CacheCleared(BaseModel):
    deleted: int
    """Answers that were forgotten."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class Version(BaseModel):
    version: str | None
    """Of vLLM."""
    gemma_serve: str


class AnthropicErrorDetail(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    type: Literal["error"]
    error: AnthropicErrorDetail


class HealthSummary(BaseModel):
    status: str
    phase: str | None = None
    """While loading: what is being done."""
    share: float | None = None
    """What is done of it, 0 to 1, where that is known."""
    reason: str | None = None

"""The sections and fields of the settings: their types, defaults and meanings. `security.py` has its own."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, FilePath, field_validator, model_validator

from .base import Names, Section, UpperCase


class ServerSettings(Section):
    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` for every interface, as in a container."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and says which."""
    ui_enabled: bool = True
    """Serve the chat page at `/`."""
    workers: int = 1
    """API processes. Only 1 for now: each would load an engine of its own."""
    max_body_bytes: int = Field(default=10_000_000, ge=1_000)
    """Largest request body in bytes; a longer one gets 413."""
    max_header_bytes: int = Field(default=32_768, ge=1_024)
    """Largest URL and headers of a request together in bytes; longer ones get 431."""
    max_connections: int = Field(default=10_000, ge=1)
    """Most open connections; further ones get 503, but health probes are answered."""
    read_timeout_seconds: float = Field(default=60, gt=0)
    """How long a client may take to send one request, body included; then it gets 408."""
    write_timeout_seconds: float = Field(default=60, gt=0)
    """How long a client may leave its answer unread; then the connection and the generation end."""
    idle_timeout_seconds: float = Field(default=75, gt=0)
    """How long a connection stays open between requests: longer than proxies and clients keep theirs."""
    tls_certificate: FilePath | None = None
    """PEM file of the certificate, its chain after it; with `tls_private_key` the server speaks HTTPS."""
    tls_private_key: FilePath | None = None
    """PEM file of the certificate's key, not encrypted."""
    keep_alive_seconds: float = Field(default=15, ge=0)
    """Silence in a stream of events after which a comment is sent, so that no proxy cuts it; 0 sends none."""
    ping_seconds: float = Field(default=45, ge=0)
    """Time between pings on a WebSocket, so that no proxy cuts it and dead clients show; 0 sends none."""
    drain_delay_seconds: float = Field(default=0, ge=0)
    """After SIGTERM, how long new requests are served while `/health/ready` is 503: load balancers lag."""
    shutdown_timeout_seconds: float = Field(default=30, ge=0)
    """How long running requests may take to finish after that."""

    @property
    def local_url(self) -> str:
        """Where a server with these settings answers on its own machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        scheme = "https" if self.tls_certificate else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @model_validator(mode="after")
    def _both_files(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_private_key is None):
            raise ValueError("server.tls_certificate and server.tls_private_key must be set together")
        return self

    @field_validator("workers")
    @classmethod
    def _one_worker(cls, value: int) -> int:
        if value != 1:
            raise ValueError(
                "must be 1: each worker would load an engine of its own; run more replicas instead"
            )
        return value


class ModelSettings(Section):
    name: str = Field(default="google/gemma-2b-it", min_length=1)
    """Hugging Face id or local folder; `gemma-demo` is the tiny model inside this package."""
    served_name: str | None = None
    """The name clients use; by default the last part of `name`."""
    aliases: Names = ()
    """Other names that clients may use for it, such as `gpt-4o-mini`."""
    max_length: int | None = Field(default=None, ge=16)
    """Context length in tokens, prompt and answer together; by default what the model was made for."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Used when a request gives none; by default what the model's own generation_config.json says."""
    chat_template: FilePath | None = None
    """Path of a Jinja chat template; by default ours for the Gemma family, or the model's own."""
    tool_parser: str = "auto"
    """vLLM's parser of the model's tool calls; `auto` takes the Gemma family's, `none` turns tools off."""
    reasoning_parser: str = "auto"
    """vLLM's parser that separates reasoning from the answer; `auto` takes the family's, `none` has none."""

    @property
    def id(self) -> str:
        return self.served_name or self.name.rstrip("/").rsplit("/", 1)[-1]


class LoadingSettings(Section):
    autoload: bool = False
    """Load a model of `models` when a request asks for it, in place of the one that runs."""
    wait_seconds: float = Field(default=0, ge=0)
    """How long a request waits while its model is loaded; 0 refuses it at once, with `Retry-After`."""
    drain_seconds: float = Field(default=60, ge=0)
    """How long requests may take to finish before their model is unloaded, or another takes its place."""
    warm_up_requests: int = Field(default=1, ge=0, le=64)
    """Short generations after a load, before the model is ready, so that no client pays for what is first."""


class StorageSettings(Section):
    url: str | None = None
    """Redis for limits, blocks, chats and answers that servers share; by default this process's memory."""
    prefix: str = Field(default="gemma", pattern=r"^[A-Za-z0-9._-]+$")
    """Start of every key there; servers with the same one share what is there."""
    fail_open: bool = True
    """While Redis is away, let requests pass without limits; `false` refuses them with 503."""
    timeout_seconds: float = Field(default=0.5, gt=0)
    """Longest wait for Redis."""

    @field_validator("url")
    @classmethod
    def _redis(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"(rediss?|unix)://", value):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value


class PerformanceSettings(Section):
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the model runs; `auto` takes the GPU when there is one."""
    precision: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Type of the weights and activations; `auto` takes what the model was published in."""
    flush_ms: float = Field(default=20, ge=0, le=1000)
    """The busier the server, the longer a token may be kept to be sent with others: this long at most."""


class CacheSettings(Section):
    enabled: bool = False
    """Answer repeated questions from a cache, in Redis where `storage.url` is set, else in memory."""
    mode: Literal["deterministic", "all"] = "deterministic"
    """`deterministic` keeps answers at temperature 0 or with a seed; `all` sampled ones too."""
    ttl_seconds: float = Field(default=3600, gt=0)
    """How long an answer is kept."""
    max_entries: int = Field(default=10_000, ge=1)
    """Most answers kept; the least recently used go first."""
    max_bytes: int = Field(default=256_000_000, ge=1_000)
    """Most bytes of answers kept, likewise."""
    shared_by: Names = ()
    """Keys, by name, that share their answers; `*` is everyone. By default nobody gets another's."""
    hits_cost_tokens: bool = False
    """Count the tokens of an answer from the cache against its client's limits."""


class ChatSettings(Section):
    max_connections: int = Field(default=5_000, ge=1)
    """Most WebSockets at the same time; further ones get 503."""
    max_connections_per_client: int = Field(default=1_000, ge=0)
    """Most WebSockets of one key, or of one address where there is no key; 0 is no limit."""
    idle_timeout_seconds: float = Field(default=3_600, gt=0)
    """Silence of its client after which a WebSocket is closed; its session can be resumed."""
    max_message_bytes: int = Field(default=1_000_000, ge=1_000)
    """Largest message of a WebSocket's client in bytes; a longer one is an error."""
    max_history_messages: int = Field(default=1_000, ge=2)
    """Most messages that a session remembers; the oldest are dropped."""
    max_history_bytes: int = Field(default=1_000_000, ge=1_000)
    """Most bytes that a session remembers; the oldest messages are dropped."""
    max_sessions_bytes: int = Field(default=268_435_456, ge=1_000_000)
    """Most bytes of sessions in this process's memory, and in Redis; those not used for longest go."""
    max_sessions_per_client: int = Field(default=10_000, ge=0)
    """Most sessions of one key, or of one address where there is no key, in Redis too; 0 is no limit."""
    session_ttl_seconds: int = Field(default=86_400, ge=1)
    """How long a session is kept after its last use."""

    @model_validator(mode="after")
    def _a_session_fits(self) -> Self:
        if self.max_history_bytes > self.max_sessions_bytes // 2:
            raise ValueError("chat.max_history_bytes must be at most half of chat.max_sessions_bytes")
        return self


class LogSettings(Section):
    level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], UpperCase] = "INFO"
    """Least severe lines that are written."""
    format: Literal["text", "json"] = "text"
    """`text`, or `json`: one object a line with request id, model, tokens and time to first token."""
    prompts: bool = False
    """Write prompts and sampling parameters to the log; they may hold personal data."""
    stats_interval_seconds: float = Field(default=60, ge=0)
    """How often a line says how busy the server is, unless nothing happens; 0 is never."""


class OtelSettings(Section):
    endpoint: str | None = Field(default=None, pattern=r"^https?://[^/\s]")
    """URL of an OTLP receiver that traces are sent to over HTTP, such as `http://collector:4318`."""
    sample_ratio: float = Field(default=1, ge=0, le=1)
    """The share of requests that is traced; a request's own `traceparent` decides where it has one."""
    service_name: str = Field(default="gemma-serve", min_length=1)
    """What the traces call this server."""

    @property
    def url(self) -> str | None:
        """Where traces go; None where none are sent."""
        if self.endpoint is None or self.endpoint.endswith("/v1/traces"):
            return self.endpoint
        return f"{self.endpoint.rstrip('/')}/v1/traces"


class HealthSettings(Section):
    stall_seconds: float = Field(default=60, gt=0)
    """Not ready when the engine has work and finishes no step for so long; longer than its longest step."""
    stall_restart_seconds: float = Field(default=180, gt=0)
    """An engine that finishes no step for so long is killed and started again; its requests go on."""
    ready_when_full: bool = False
    """Stay ready while the queue is full: where all servers are, no proxy is left to say `Retry-After`."""


class QueueSettings(Section):
    max_requests: int = Field(default=4096, ge=0)
    """Most requests that wait for the engine; further ones get 503 with `Retry-After`."""
    max_tokens: int = Field(default=2_000_000, ge=0)
    """Most prompt tokens, estimated from the size of the bodies, that wait for the engine."""
    wait_seconds: float = Field(default=120, gt=0)
    """Longest that a request waits for the engine before it gets 503 with `Retry-After`."""


class SupervisorSettings(Section):
    max_restarts: int = Field(default=10, ge=0)
    """How often a dead engine is started again, in vain or within the window, before the server gives up."""
    restart_window_seconds: float = Field(default=600, gt=0)
    """The window of `max_restarts`."""


class LimitsSettings(Section):
    max_n: int = Field(default=128, ge=1)
    """Most answers (`n`) that one request may ask for."""
    max_sequences: int = Field(default=1024, ge=1)
    """Most answers that one request with several prompts may ask for: prompts times `n`."""
    max_tokens: int = Field(default=0, ge=0)
    """Longest answer in tokens, also where a request does not say; 0 is what the context leaves."""
    max_stop: int = Field(default=4, ge=0)
    """Most stop strings; each is looked for at every token."""
    max_word_lists: int = Field(default=256, ge=0)
    """Most entries of `bad_words` and of `stop_token_ids`."""
    max_tools: int = Field(default=128, ge=0)
    """Most tools of one request."""
    max_schema_bytes: int = Field(default=262_144, ge=0)
    """Largest JSON schema, or tools together, in bytes; grammars are compiled from them."""
    max_images: int = Field(default=16, ge=0)
    """Most images of one request."""
    max_json_depth: int = Field(default=64, ge=8, le=200)  # orjson writes 254 levels, some of them ours
    """Deepest nesting of a request's JSON."""
    request_timeout_seconds: float = Field(default=0, ge=0)
    """Longest time for one answer, after which it ends with an error; 0 is no limit."""
    max_logprobs: int = Field(default=20, ge=0)
    """Most `top_logprobs` or `prompt_logprobs` a token; each is memory and time in the engine."""

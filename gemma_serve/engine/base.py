"""What the rest of the server knows of an engine. No vLLM here: importing this is cheap."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, Protocol

from ..errors import EngineNotReady, ServeError


class EngineState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    STALLED = "stalled"
    """It has work and finishes no step."""
    RESTARTING = "restarting"
    """It died; its requests wait for the next one."""
    FAILED = "failed"
    """The model could not be loaded."""
    DEAD = "dead"
    """It died too often to be started again."""
    UNLOADED = "unloaded"
    """No model is loaded; one can be."""
    SLEEPING = "sleeping"
    """The model has given its device's memory back, and can be woken."""
    STOPPED = "stopped"


_SERVING = {EngineState.READY, EngineState.STALLED, EngineState.RESTARTING}
_NOT_SERVING = {
    EngineState.LOADING: "The model is still loading",
    EngineState.FAILED: "The model could not be loaded",
    EngineState.DEAD: "The engine has stopped",
    EngineState.UNLOADED: "No model is loaded",
    EngineState.SLEEPING: "The model sleeps",
    EngineState.STOPPED: "The server is shutting down",
}


class EngineChange(NamedTuple):
    time: float
    """Seconds since 1970."""
    state: EngineState
    phase: str
    error: str | None


_REMEMBERED_CHANGES = 20


class EngineStatus:
    """The state of the engine; one object, shared by all who ask."""

    def __init__(self) -> None:
        self.state = EngineState.LOADING
        self.phase = "starting"
        self.error: str | None = None
        self.history = deque(
            [EngineChange(time.time(), self.state, self.phase, None)], maxlen=_REMEMBERED_CHANGES
        )
        """The last changes, the newest at the end."""
        self.restarts = 0
        """How often another engine was started in place of a dead one, or tried to."""
        self._stalled_before = 0.0
        self._stalled_since: float | None = None
        self.on_change: Callable[[EngineStatus], None] = lambda status: None

    @property
    def ready(self) -> bool:
        """Would a request sent now be worked on at once?"""
        return self.state is EngineState.READY

    @property
    def serving(self) -> bool:
        """Are requests taken, though they may have to wait?"""
        return self.state in _SERVING

    @property
    def failed(self) -> bool:
        """Nothing will be served any more: the process should end."""
        return self.state in (EngineState.FAILED, EngineState.DEAD)

    @property
    def stalled_seconds(self) -> float:
        """For how long it has been stalled since the start, in all."""
        now = self._stalled_since is not None and time.monotonic() - self._stalled_since
        return self._stalled_before + now

    def set(self, state: EngineState, phase: str = "", error: str | None = None) -> None:
        """Move on. `phase` is what a person reads while waiting: "importing vLLM", "loading weights"."""
        if (state is EngineState.STALLED) != (self._stalled_since is not None):
            self._stalled_before = self.stalled_seconds
            self._stalled_since = time.monotonic() if state is EngineState.STALLED else None
        self.restarts += state is EngineState.RESTARTING
        self.state, self.phase, self.error = state, phase, error
        self.history.append(EngineChange(time.time(), state, phase, error))
        self.on_change(self)

    def require_serving(self) -> None:
        """Raise `EngineNotReady`, with when to come back, unless requests are taken."""
        if not self.serving:
            detail = f" ({self.phase})" if self.phase else ""
            raise EngineNotReady(
                f"{_NOT_SERVING[self.state]}{detail}. Try again shortly.", code=f"engine_{self.state}"
            )


@dataclass(frozen=True, slots=True)
class Device:
    """What the model runs on."""

    type: str
    """`cpu`, `cuda`, …"""
    name: str
    count: int
    """How many of them the model is spread over."""
    cuda: bool
    """Is CUDA available?"""


class GpuMemory(NamedTuple):
    """Of one GPU, in bytes; other programs' share is counted too."""

    used: int
    total: int


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What the engine said last; None is what is not known (yet)."""

    loaded: float | None = None
    """What is done of the present phase of a load, 0 to 1."""
    running: int = 0
    """Sequences that it works on."""
    waiting: int = 0
    """Sequences that it has taken and not begun."""
    kv_cache_use: float | None = None
    """Share of the KV cache that is in use, 0 to 1."""
    kv_cache_bytes: int | None = None
    """Size of the KV cache."""
    generated_tokens: int | None = None
    """Since the start."""
    resumed: int = 0
    """Requests that went on after an engine died, since the start."""
    processes: tuple[int, ...] = ()
    """Their process ids."""
    device: Device | None = None


Kind = Literal["chat", "completion"]
RelayKind = Literal["responses", "messages", "count_tokens", "tokenize", "detokenize", "embeddings", "count"]
"""APIs that vLLM's own handlers answer; `count` is `tokenize` also of what is too long for the model."""

CacheUse = Literal["use", "refresh", "off"]
"""What a client wants of the response cache; `refresh` is an answer made now, which is kept."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in the engine; another object each time that it is loaded."""

    identity: str
    """A digest of its weights and of how the engine runs it: what has the same gives the same answers."""
    temperature: float = 1.0
    """Where a request gives none."""
    family: str | None = None
    """Such as `Gemma 3`."""
    modalities: tuple[str, ...] = ("text",)
    """What it takes: `text`, `image`, `audio`."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated request body on its way to the engine."""

    kind: Kind
    body: dict[str, Any]
    request_id: str
    model: str
    """The served model's own name; `body["model"]` may be an alias."""
    size: int = 0
    """Of the body as it was sent, in bytes."""
    answers: int = 1
    """How many sequences the engine works on for it: prompts times `n`."""
    cache: CacheUse = "use"

    @property
    def public_id(self) -> str:
        """The part of the answer's id that is this request's."""
        return str(self.body.get("request_id") or self.request_id)


_COUNTS = {"prompt_tokens", "completion_tokens", "total_tokens"}


@dataclass(slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    """OpenAI's `prompt_tokens_details` and `completion_tokens_details`, where the engine reports them."""

    @classmethod
    def of_body(cls, body: dict[str, Any]) -> Usage:
        """What `body` gave."""
        details = {name: value for name, value in body.items() if name not in _COUNTS}
        return cls(body["prompt_tokens"], body["completion_tokens"], details)

    def body(self) -> dict[str, Any]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
            **self.details,
        }


@dataclass(slots=True)
class Delta:
    """What one engine step added to one choice."""

    index: int
    text: str
    finish_reason: str | None = None
    delta: dict[str, Any] | None = None
    """In place of `text` where there is more than text: tool calls, reasoning, in OpenAI's streamed shape."""
    choice: dict[str, Any] | None = None
    """Further fields of the choice: logprobs, stop_reason, token_ids."""
    extra: dict[str, Any] | None = None
    """Further top-level fields of the chunk, such as `prompt_token_ids`."""


class Sink(Protocol):
    """Where a stream's text is written."""

    def put(self, delta: Delta) -> None:
        """Keep it until it is written."""
        ...

    def put_texts(self, texts: list[str]) -> None:
        """Likewise: a delta each, of the first answer, that has nothing else. None is empty."""
        ...

    def flush(self) -> bool:
        """Write what is kept, if nothing has to be waited for; otherwise False."""
        ...

    async def drain(self) -> None:
        """Write what is kept."""
        ...


class StreamHead(Protocol):
    """What every chunk of a stream says. Ask when the first is there."""

    @property
    def id(self) -> str: ...

    @property
    def created(self) -> int: ...

    @property
    def model(self) -> str: ...

    @property
    def fingerprint(self) -> str | None: ...

    @property
    def usage(self) -> Usage:
        """Counts so far; final once the stream has ended."""
        ...


class TokenStream(StreamHead, Protocol):
    """A generation under way. Iterate it once; `aclose` at any time stops the engine's work on it."""

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Yields what arrived together, at least one delta each time. Raises `ServeError`."""
        ...

    async def feed(self, sink: Sink) -> None:
        """In place of the iteration: give `sink` everything as it comes. Raises `ServeError`."""
        ...

    async def aclose(self) -> None: ...


class Stream:
    """Feeds a sink with what it yields; for streams that cannot do better."""

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        raise NotImplementedError

    async def feed(self, sink: Sink) -> None:
        async for deltas in self:
            for delta in deltas:
                sink.put(delta)
            if not sink.flush():
                await sink.drain()


class Engine(Protocol):
    """A model that answers, or says why it cannot yet."""

    status: EngineStatus

    async def start(self) -> None:
        """Begin to load in the background; returns at once."""
        ...

    async def stop(self) -> None:
        """Stop all work and every process of the engine."""
        ...

    async def check(self) -> None:
        """Find what would keep the model from loading, as far as that can be told without its weights.

        Raises `StartupError`.
        """
        ...

    def abandon(self, error: ServeError) -> None:
        """Fail every request that it works on with `error`, and take no others until `wake`."""
        ...

    def require_sleep(self) -> None:
        """Raise `NotImplementedHere` where the model cannot sleep."""
        ...

    async def sleep(self, level: int) -> None:
        """Give the device's memory back: 1 keeps the weights in the machine's memory, 2 drops them."""
        ...

    async def wake(self) -> None:
        """Be as before `sleep`."""
        ...

    async def load_adapter(self, name: str, path: str) -> LoadedModel:
        """Serve the LoRA adapter of the folder or Hugging Face id `path` as `name`. Raises `ServeError`."""
        ...

    async def unload_adapter(self, name: str) -> None: ...

    async def complete(self, request: GenerationRequest) -> tuple[dict[str, Any], Usage]:
        """The whole answer in OpenAI's shape. Cancelling it aborts the generation. Raises `ServeError`."""
        ...

    async def stream(self, request: GenerationRequest) -> TokenStream:
        """Validate and prepare; the stream starts when it is iterated. Raises `ServeError`."""
        ...

    async def relay(
        self, kind: RelayKind, body: dict[str, Any]
    ) -> dict[str, Any] | AsyncGenerator[bytes, None]:
        """The answer of vLLM's own handler, or its server-sent events. Raises `ServeError`."""
        ...

    def loaded(self) -> LoadedModel | None:
        """None before it is."""
        ...

    def capacity(self) -> int:
        """How many answers it works on at once."""
        ...

    def model_length(self) -> int | None:
        """Context length in tokens, once it is known."""
        ...

    def report(self) -> EngineReport:
        """From memory, in microseconds."""
        ...

    def gpu_memory(self) -> list[GpuMemory]:
        """Of each GPU that the model uses. Takes milliseconds: for a thread."""
        ...

"""A small engine for tests whose subject is not the engine: it answers with the words that it was given."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import orjson

from gemma_serve.engine.base import (
    Delta,
    EngineReport,
    EngineState,
    EngineStatus,
    GenerationRequest,
    GpuMemory,
    LoadedModel,
    RelayKind,
    Stream,
    Usage,
)
from gemma_serve.errors import InvalidRequest, NotImplementedHere, ServeError


class FakeStream(Stream):
    model = "gemma-demo"
    fingerprint: str | None = "fake"

    def __init__(self, engine: FakeEngine, request: GenerationRequest) -> None:
        self.id = f"chatcmpl-{request.request_id}"
        self.created = int(time.time())
        self.usage = Usage()
        self._engine = engine
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        for position, word in enumerate(self._engine.words):
            if position == self._engine.fail_at:
                raise self._engine.error
            if position == self._engine.hang_at:
                await self._engine.hang()
            await asyncio.sleep(self._engine._pause)
            self.usage.prompt_tokens = 3  # known with the first token
            self.usage.completion_tokens += 1
            last = position == len(self._engine.words) - 1
            yield [Delta(0, word, self._engine.finish_reason if last else None)]

    async def aclose(self) -> None:
        self.closed = True


class FakeEngine:
    """`hang_at` and `fail_at`: the word before which it stops or raises `error`; `pause`: seconds a word."""

    def __init__(
        self,
        words: tuple[str, ...] = ("Hello", " world"),
        *,
        hang_at: int | None = None,
        fail_at: int | None = None,
        error: BaseException | None = None,
        ready: bool = True,
        pause: float = 0.0,
        usage: dict[str, Any] | None = None,
    ) -> None:
        self.adapters: dict[str, str] = {}
        self.adapters_load = asyncio.Event()
        """Clear it to have them wait."""
        self.adapters_load.set()
        self.asleep = 0
        """The level of its sleep."""
        self.can_sleep = True
        self.abandoned: ServeError | None = None
        self.stopped = False
        self.words, self.hang_at, self.fail_at = words, hang_at, fail_at
        self.error = error or ServeError("the fake engine failed")
        self.status = EngineStatus()
        self.finish_reason = "stop"
        self.model = LoadedModel("fake")
        self.requests: list[GenerationRequest] = []
        self.streams: list[FakeStream] = []
        self.hanging = 0
        self.cancelled = 0
        self._ready = ready
        self.go_on = asyncio.Event()
        """Set it to end the hanging."""
        self.resumed = 0
        self._pause = pause
        self._usage = usage

    async def start(self) -> None:
        if self._ready:
            self.status.set(EngineState.READY)

    async def stop(self) -> None:
        self.stopped = True
        self.status.set(EngineState.STOPPED)

    async def check(self) -> None:
        pass

    def abandon(self, error: ServeError) -> None:
        self.abandoned = error
        self.status.set(EngineState.UNLOADED)
        self.go_on.set()

    def require_sleep(self) -> None:
        if not self.can_sleep:
            raise NotImplementedHere("The fake engine cannot sleep.")

    async def sleep(self, level: int) -> None:
        self.asleep = level

    async def wake(self) -> None:
        self.asleep = 0
        self.abandoned = None
        self.status.set(EngineState.READY)

    async def load_adapter(self, name: str, path: str) -> LoadedModel:
        if path == "missing":
            raise InvalidRequest("there is no such adapter", param="path")
        await self.adapters_load.wait()
        if name in self.adapters:
            raise InvalidRequest(f"{name} is loaded already", param="name")
        self.adapters[name] = path
        return LoadedModel(f"{self.model.identity} {path}")

    async def unload_adapter(self, name: str) -> None:
        del self.adapters[name]

    async def complete(self, request: GenerationRequest) -> tuple[dict[str, Any], Usage]:
        self.requests.append(request)
        if self.fail_at is not None:
            raise self.error
        if self.hang_at is not None:
            await self.hang()
        await asyncio.sleep(self._pause * len(self.words))
        usage, text = Usage(3, len(self.words)), "".join(self.words)
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": self.finish_reason}
        if request.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        answer = {
            "id": f"chatcmpl-{request.request_id}",
            "object": "chat.completion" if request.kind == "chat" else "text_completion",
            "created": int(time.time()),
            "model": request.model,
            "choices": [choice],
            "system_fingerprint": "fake",
            "usage": usage.body(),
        }
        return answer, usage

    async def stream(self, request: GenerationRequest) -> FakeStream:
        self.requests.append(request)
        self.streams.append(FakeStream(self, request))
        return self.streams[-1]

    async def relay(
        self, kind: RelayKind, body: dict[str, Any]
    ) -> dict[str, Any] | AsyncGenerator[bytes, None]:
        answer = {"kind": kind, "body": body, "usage": self._usage}
        return self._events(answer) if body.get("stream") else answer

    async def _events(self, answer: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        yield b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n'
        yield b"event: message_delta\ndata: " + orjson.dumps(answer) + b"\n\n"

    async def hang(self) -> None:
        self.hanging += 1
        try:
            await self.go_on.wait()
            if self.abandoned is not None:
                raise self.abandoned
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def loaded(self) -> LoadedModel | None:
        return self.model

    def capacity(self) -> int:
        return 256

    def model_length(self) -> int | None:
        return 4096

    def report(self) -> EngineReport:
        streamed = sum(stream.usage.completion_tokens for stream in self.streams)
        return EngineReport(generated_tokens=streamed, resumed=self.resumed)

    def gpu_memory(self) -> list[GpuMemory]:
        return []

"""The seam between this server and vLLM: an `EngineClient` around `AsyncLLM`.

Our routes and vLLM's own serving classes all generate through it, so what it does holds for every route.
What it does not change it hands on to the engine that runs now.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM

from ..tracing import current_trace
from .base import EngineStatus, Sink, Usage
from .direct import DirectOutput, Flushes, tap


class Supervisor(EngineClient):  # type: ignore[misc]
    """Admits requests while they can be served, and aborts them when they are left."""

    def __init__(self, llm: AsyncLLM, status: EngineStatus) -> None:
        self._llm = llm
        self._status = status
        self._running: Counter[str] = Counter()
        """Requests by their id, which is their client's to choose: others may have the same."""

    @property
    def flushes(self) -> Flushes:
        flushes: Flushes = self._llm.engine_core.flushes
        return flushes

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self._status.require_serving()
        if (trace := current_trace.get()) is not None:
            kwargs["trace_headers"] = trace.headers
        outputs = self._llm.generate(prompt, sampling_params, request_id, **kwargs)
        self._running[request_id] += 1
        try:
            async for output in outputs:
                yield output
        finally:
            try:
                await outputs.aclose()  # aborts the request unless it has finished
            finally:
                self._running[request_id] -= 1
                if not self._running[request_id]:
                    del self._running[request_id]

    async def remove_lora(self, lora_id: int) -> bool:
        """Not of `EngineClient`: vLLM's own server leaves adapters in the engine."""
        removed: bool = await self._llm.remove_lora(lora_id)
        return removed

    def tap(self, result: RequestOutput, sink: Sink, usage: Usage) -> DirectOutput | None:
        """Lead what comes after `result` straight to `sink`; None where that cannot be."""
        if self._running[result.request_id] != 1:
            return None  # vLLM would find another's, once this one has finished
        return tap(self._llm.output_processor, self.flushes, result, sink, usage)


def _handed_on(name: str) -> property:
    return property(lambda self: getattr(self._llm, name))


def _delegate(cls: type[Supervisor]) -> None:
    """Hand every other member of the interface to `_llm`, whichever vLLM version defines it."""
    names = {name for name in vars(EngineClient) if not name.startswith("_")} | set(
        EngineClient.__annotations__
    )
    for name in names - set(vars(cls)):
        setattr(cls, name, _handed_on(name))
    abc.update_abstractmethods(cls)


_delegate(Supervisor)

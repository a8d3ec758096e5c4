"""`n` greedy answers: OpenAI gives n equal ones, vLLM refuses. Here one is generated and told n times."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from .base import Delta, Stream, TokenStream, Usage

_GREEDY = 1e-5  # vLLM samples greedily below this temperature


def copies(body: dict[str, Any], default_temperature: float) -> int:
    """How often to tell the one answer that is generated; 1 when the answers differ."""
    n = body.get("n") or 1
    temperature = body.get("temperature")
    if temperature is None:
        temperature = default_temperature
    return n if temperature < _GREEDY and not body.get("use_beam_search") else 1


def repeat_answer(answer: dict[str, Any], usage: Usage, n: int) -> tuple[dict[str, Any], Usage]:
    """OpenAI numbers the n answers to the first prompt first."""
    choices = [
        choice | {"index": choice["index"] * n + copy} for choice in answer["choices"] for copy in range(n)
    ]
    usage = replace(usage, completion_tokens=usage.completion_tokens * n)
    return answer | {"choices": choices, "usage": usage.body()}, usage


class RepeatedStream(Stream):
    """A `TokenStream` whose every delta comes once for each copy."""

    def __init__(self, stream: TokenStream, n: int) -> None:
        self._stream = stream
        self._n = n
        self.id, self.created, self.model = stream.id, stream.created, stream.model
        self.fingerprint = stream.fingerprint

    @property
    def usage(self) -> Usage:
        usage = self._stream.usage
        return replace(usage, completion_tokens=usage.completion_tokens * self._n)

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        async for deltas in self._stream:
            yield [
                replace(delta, index=delta.index * self._n + copy)
                for delta in deltas
                for copy in range(self._n)
            ]

    async def aclose(self) -> None:
        await self._stream.aclose()

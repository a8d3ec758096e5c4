"""vLLM's output as our `TokenStream`.

Plain text goes straight from the engine's output to `Delta`; everything else (tool calls, reasoning,
logprobs, echo, …) is read back from vLLM's own chunks, so that it equals vLLM's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

import orjson
from vllm.outputs import RequestOutput

from ..errors import InvalidRequest, ServeError
from . import base
from .base import Delta, Sink, Usage
from .supervisor import Supervisor
from .vllm_errors import map_error, mapped_errors, raise_for_error
from .vllm_names import ErrorResponse, UsageInfo

logger = logging.getLogger(__name__)
T = TypeVar("T")


def generation_failed(constrained: bool) -> ServeError:
    """vLLM ends a request with "error", without a reason; with a grammar the grammar is at fault."""
    if constrained:
        return InvalidRequest(
            "The engine could not follow the grammar or schema of this request: nothing matches it, or not "
            "within the answer's length.",
            param="structured_outputs",
        )
    logger.error("The engine ended a request with an error; its own lines above say why")
    return ServeError("The engine failed on this request; the server's log says why.")


class Stream(base.Stream):
    """Common to both kinds: see `base.TokenStream`."""

    id = ""
    model = ""
    fingerprint: str | None = None

    def __init__(self, source: AsyncGenerator[Any, None]) -> None:
        self.created = int(time.time())
        self.usage = Usage()
        self._source = source

    async def aclose(self) -> None:
        await self._source.aclose()


class PlainStream(Stream):
    """Text and finish reasons, straight from the engine's outputs."""

    def __init__(
        self,
        engine: Supervisor,
        results: AsyncGenerator[tuple[int, RequestOutput], None],
        n: int,
        constrained: bool,
        prompts: int = 1,
    ) -> None:
        super().__init__(results)
        self._engine = engine
        self._single = n == prompts == 1
        self._n = n
        self._constrained = constrained

        self._prompts_counted: set[int] = set()

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        with mapped_errors():
            async for prompt_index, result in self._source:
                if deltas := self._deltas(prompt_index, result):
                    yield deltas

    async def feed(self, sink: Sink) -> None:
        with mapped_errors():
            async for prompt_index, result in self._source:
                deltas = self._deltas(prompt_index, result)
                for delta in deltas:
                    sink.put(delta)
                if deltas and not sink.flush():
                    await sink.drain()
                if self._single and (rest := self._engine.tap(result, sink, self.usage)) is not None:
                    await rest.run()
                    if rest.finish_reason == "error":
                        raise generation_failed(self._constrained)
                    return

    def _deltas(self, prompt_index: int, result: RequestOutput) -> list[Delta]:
        usage = self.usage
        if result.prompt_token_ids is not None and prompt_index not in self._prompts_counted:
            self._prompts_counted.add(prompt_index)
            usage.prompt_tokens += len(result.prompt_token_ids)
            _add_cached(usage, result.num_cached_tokens)
        deltas = []
        for output in result.outputs:
            usage.completion_tokens += len(output.token_ids)
            reason = output.finish_reason
            if reason == "error":
                raise generation_failed(self._constrained)
            if not output.text and reason is None:
                continue  # half a character, or a prefill step
            stop = None if output.stop_reason is None else {"stop_reason": output.stop_reason}
            deltas.append(Delta(output.index + prompt_index * self._n, output.text, reason, None, stop))
        return deltas


class Below:
    """What vLLM's generator does not tell, or late: the tokens so far, the error in its own words."""

    def __init__(self) -> None:
        self.usage = Usage()
        self.error: BaseException | None = None
        self._prompts: set[int] = set()

    async def watched(self, results: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        try:
            async for result in results:
                self._count(*(result if isinstance(result, tuple) else (0, result)))
                yield result
        except Exception as error:
            self.error = error
            raise
        finally:
            await results.aclose()

    def _count(self, prompt_index: int, result: RequestOutput) -> None:
        if result.prompt_token_ids is not None and prompt_index not in self._prompts:
            self._prompts.add(prompt_index)
            self.usage.prompt_tokens += len(result.prompt_token_ids)
        self.usage.completion_tokens += sum(len(output.token_ids) for output in result.outputs)


class ChunkStream(Stream):
    """Whatever vLLM's own generator streams, read back from its SSE text."""

    def __init__(
        self,
        chunks: AsyncGenerator[str, None],
        results: AsyncGenerator[Any, None],
        metadata: Any,
        below: Below,
    ) -> None:
        super().__init__(chunks)
        self.usage = below.usage
        self._results = results
        self._request_metadata = metadata
        self._below = below

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        async for event in self._source:
            data = event.removeprefix("data: ").rstrip()
            if data == "[DONE]":
                break
            chunk = orjson.loads(data)
            if "error" in chunk:
                if self._below.error is not None:
                    raise map_error(self._below.error)
                raise_for_error(ErrorResponse(**chunk))
            extra = {key: value for key, value in chunk.items() if key not in _CONSTANT and value is not None}
            # Our writer says who speaks; vLLM's chunk for that is of use only for what it carries besides.
            deltas = [_delta(choice, extra) for choice in chunk["choices"] if extra or not _only_role(choice)]
            if deltas:
                yield deltas
        if (usage := self._request_metadata.final_usage_info) is not None:
            self.usage = usage_of(usage)

    async def aclose(self) -> None:
        await self._source.aclose()
        await self._results.aclose()  # does not close by itself when vLLM's generator was never started


_CONSTANT = {"id", "object", "created", "model", "choices", "system_fingerprint"}


def _only_role(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return "role" in delta and not delta.get("content") and choice.get("finish_reason") is None


def _delta(choice: dict[str, Any], extra: dict[str, Any]) -> Delta:
    index, reason = choice.pop("index"), choice.pop("finish_reason", None)
    delta = choice.pop("delta", None)
    text = choice.pop("text", "")
    if delta is not None:
        delta = {key: value for key, value in delta.items() if value is not None and key != "role"}
        for call in delta.get("tool_calls", ()):  # OpenAI names the function in its first piece only
            if (function := call.get("function") or {}).get("name", "") is None:
                del function["name"]
        if delta.keys() <= {"content"}:
            text, delta = delta.get("content", ""), None
    details = {key: value for key, value in choice.items() if value is not None}
    return Delta(index, text, reason, delta, details or None, extra or None)


def _add_cached(usage: Usage, cached: int | None) -> None:
    if cached is not None:
        details = usage.details.setdefault("prompt_tokens_details", {"cached_tokens": 0})
        details["cached_tokens"] += cached


def usage_of(info: UsageInfo) -> Usage:
    usage = Usage(info.prompt_tokens, info.completion_tokens or 0)
    if info.prompt_tokens_details is not None:
        _add_cached(usage, info.prompt_tokens_details.cached_tokens)
    if getattr(info, "completion_tokens_details", None) is not None:  # vLLM 0.26 has no such field
        usage.details["completion_tokens_details"] = info.completion_tokens_details.model_dump()
    return usage

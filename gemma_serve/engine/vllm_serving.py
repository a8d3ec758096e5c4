"""vLLM's chat and completion handlers, with their output turned into our `TokenStream` and plain dicts.

Validation, rendering, sampling parameters and parsers stay vLLM's. Overridden is only the step that turns
engine outputs into SSE text (see `vllm_streams.py`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import RequestOutput

from .base import Usage
from .vllm_streams import Below, ChunkStream, PlainStream, Stream, usage_of


class ChatServing(OpenAIServingChat):  # type: ignore[misc]
    def chat_completion_stream_generator(
        self,
        request: ChatCompletionRequest,
        result_generator: AsyncGenerator[RequestOutput, None],
        request_id: str,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Stream:
        parser = self.parser_cls
        parsed = parser is not None and (request.tools or parser.reasoning_parser_cls is not None)
        plain = not (parsed or request.logprobs or request.echo or _wants_details(request))
        if plain:
            stream: Stream = PlainStream(
                self.engine_client, _numbered(result_generator), request.n or 1, _constrained(request)
            )
        else:
            below = Below()
            results = below.watched(result_generator)
            chunks = super().chat_completion_stream_generator(
                request, results, request_id, model_name, *args, **kwargs
            )
            stream = ChunkStream(chunks, result_generator, _metadata(args, kwargs), below)
        stream.id, stream.model, stream.fingerprint = request_id, model_name, self.system_fingerprint
        return stream


class CompletionServing(OpenAIServingCompletion):  # type: ignore[misc]
    def completion_stream_generator(
        self,
        request: CompletionRequest,
        engine_inputs: Any,
        result_generator: AsyncGenerator[tuple[int, RequestOutput], None],
        request_id: str,
        created_time: int,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Stream:
        plain = request.logprobs is None and not (request.echo or _wants_details(request))
        if plain:
            stream: Stream = PlainStream(
                self.engine_client,
                result_generator,
                request.n or 1,
                _constrained(request),
                len(engine_inputs),
            )
        else:
            below = Below()
            results = below.watched(result_generator)
            if request.echo:
                results = _with_prompt_logprobs(results)
            chunks = super().completion_stream_generator(
                request, engine_inputs, results, request_id, created_time, model_name, *args, **kwargs
            )
            stream = ChunkStream(chunks, result_generator, _metadata(args, kwargs), below)
        stream.id, stream.model, stream.fingerprint = request_id, model_name, self.system_fingerprint
        stream.created = created_time
        return stream


def _constrained(request: ChatCompletionRequest | CompletionRequest) -> bool:
    return request.structured_outputs is not None or request.response_format is not None


def _wants_details(request: ChatCompletionRequest | CompletionRequest) -> bool:
    options = request.stream_options
    return bool(
        request.return_token_ids
        or getattr(request, "return_prompt_text", None)
        or (options is not None and options.continuous_usage_stats)
    )


def _metadata(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """vLLM leaves the final usage in the RequestResponseMetadata that it passes to its generators."""
    candidates = [*args, *kwargs.values()]
    return next(item for item in candidates if hasattr(item, "final_usage_info"))


async def _numbered(
    results: AsyncGenerator[RequestOutput, None],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    try:
        async for result in results:
            yield 0, result
    finally:
        await results.aclose()


async def _with_prompt_logprobs(
    results: AsyncGenerator[tuple[int, RequestOutput], None],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """vLLM loses the prompt's logprobs of one of n answers when it merges its first token with another's
    second, and then fails on echoing the prompt; they are the same for all n.
    """
    known: dict[int, Any] = {}
    try:
        async for prompt_index, result in results:
            if result.prompt_logprobs:
                known[prompt_index] = result.prompt_logprobs
            result.prompt_logprobs = known.get(prompt_index)
            yield prompt_index, result
    finally:
        await results.aclose()


def chat_answer(response: ChatCompletionResponse) -> tuple[dict[str, Any], Usage]:
    """OpenAI's `chat.completion` object: its fields always, vLLM's further ones where they hold something."""
    body, usage = _answer(response)
    for choice in body["choices"]:
        choice["message"] = {"role": None, "content": None, "refusal": None} | choice["message"]
        choice["message"]["role"] = "assistant"  # vLLM says "user" when a user's message was continued
        if choice["message"].get("tool_calls") and not choice["message"]["content"]:
            choice["message"]["content"] = None  # vLLM says "" when it forced the call
    return body, usage


def completion_answer(response: CompletionResponse) -> tuple[dict[str, Any], Usage]:
    """OpenAI's `text_completion` object, likewise."""
    return _answer(response)


def _answer(response: ChatCompletionResponse | CompletionResponse) -> tuple[dict[str, Any], Usage]:
    usage = usage_of(response.usage)
    body = response.model_dump(mode="json", exclude_none=True, exclude={"usage"})
    for choice in body["choices"]:
        choice.setdefault("logprobs", None)
    body["usage"] = usage.body()
    return body, usage

"""Other APIs that vLLM's own handlers speak, on our engine: Responses, Messages, tokenizing, embeddings.

Their bodies, answers and events stay vLLM's; model names, errors, abort and admission are ours.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

import orjson
from vllm.config import ModelConfig
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
    AnthropicMessagesResponse,
)
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeRequest,
)
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.renderers import TokenizeParams
from vllm.renderers.online_renderer import OnlineRenderer

from ..errors import ContextLengthExceeded, InvalidRequest
from .base import Kind, RelayKind
from .chat_template import TemplateVariables
from .fail_fast import validator
from .supervisor import Supervisor
from .vllm_errors import mapped_errors, raise_for_error


class TokenizeText(TokenizeCompletionRequest):  # type: ignore[misc]
    """As long as the model takes: vLLM's has no limit, which chats and completions have."""

    def build_tok_params(self, model_config: ModelConfig) -> TokenizeParams:
        return _limited(super().build_tok_params(model_config), model_config)


class TokenizeChat(TokenizeChatRequest):  # type: ignore[misc]
    """Likewise."""

    def build_tok_params(self, model_config: ModelConfig) -> TokenizeParams:
        return _limited(super().build_tok_params(model_config), model_config)


def _limited(params: TokenizeParams, model_config: ModelConfig) -> TokenizeParams:
    return dataclasses.replace(params, max_total_tokens=model_config.max_model_len)


REQUESTS: dict[RelayKind, Any] = {
    "responses": ResponsesRequest,
    "messages": AnthropicMessagesRequest,
    "count_tokens": AnthropicCountTokensRequest,
    "tokenize": TokenizeText | TokenizeChat,
    "detokenize": DetokenizeRequest,
    "embeddings": EmbeddingCompletionRequest,
    "count": TokenizeRequest,
}
_VALIDATORS = {kind: validator(model) for kind, model in REQUESTS.items()}


def embeds(supervisor: Supervisor) -> bool:
    """Whether the model turns text into vectors, and so cannot write."""
    return bool(supervisor.model_config.runner_type == "pooling")


def refuse_what_the_model_cannot(kind: Kind | RelayKind, embeds: bool) -> None:
    """Raise `InvalidRequest` when a model that embeds is asked to write, or the other way round."""
    if embeds and kind not in ("embeddings", "tokenize", "detokenize", "count"):
        raise InvalidRequest(
            "This server runs a model that embeds and does not write: use POST /v1/embeddings.", param="model"
        )
    if kind == "embeddings" and not embeds:
        raise InvalidRequest(
            "This server runs a model that writes and does not embed: embeddings need a server with a model "
            "such as google/embeddinggemma-300m.",
            param="model",
        )


class MessagesServing(AnthropicServingMessages):  # type: ignore[misc]
    def messages_full_converter(self, generator: ChatCompletionResponse) -> AnthropicMessagesResponse:
        """Without a tool call whose arguments `max_tokens` cut off, which are no JSON."""
        message = generator.choices[0].message
        message.tool_calls = [call for call in message.tool_calls if _is_json(call.function.arguments)]
        return super().messages_full_converter(generator)


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


class Relay:
    """Takes the keyword arguments that vLLM's handlers share."""

    def __init__(
        self,
        supervisor: Supervisor,
        models: OpenAIServingModels,
        renderer: OnlineRenderer,
        variables: TemplateVariables,
        **shared: Any,
    ) -> None:
        self._variables = variables
        self._most = supervisor.model_config.max_model_len
        self._embeds = embeds(supervisor)
        templates = {name: shared[name] for name in ("chat_template", "chat_template_content_format")}
        parsers = {name: shared[name] for name in ("enable_auto_tools", "tool_parser", "reasoning_parser")}
        common = {
            "request_logger": shared["request_logger"],
            "enable_prompt_tokens_details": True,
            **templates,
            **parsers,
        }
        responses = OpenAIServingResponses(supervisor, models, renderer, **common)
        messages = MessagesServing(supervisor, models, "assistant", online_renderer=renderer, **common)
        tokens = ServingTokenization(models, renderer, request_logger=shared["request_logger"], **templates)
        self._handlers = {
            "responses": responses.create_responses,
            "messages": messages.create_messages,
            "count_tokens": messages.count_tokens,
            "tokenize": tokens.create_tokenize,
            "count": tokens.create_tokenize,
            "detokenize": tokens.create_detokenize,
        }
        if self._embeds:
            from .embeddings import Embeddings

            self._handlers["embeddings"] = Embeddings(supervisor, models, shared["request_logger"]).create

    async def call(
        self, kind: RelayKind, body: dict[str, Any]
    ) -> dict[str, Any] | AsyncGenerator[bytes, None]:
        """The answer, or its server-sent events when the body asks for a stream. Raises `ServeError`."""
        refuse_what_the_model_cannot(kind, self._embeds)
        if kind == "detokenize":
            self._refuse_too_many(body.get("tokens"))
        self._variables.check(body.get("chat_template_kwargs"))
        with mapped_errors():
            try:
                request = _VALIDATORS[kind].validate_python(body)
            except (AttributeError, KeyError, TypeError) as error:
                raise InvalidRequest(f"The request holds a value of the wrong type: {error}.") from error
            if getattr(request, "background", None):
                # vLLM answers at once and generates on: past the queue, the quotas and the drain.
                message = "This server has no background mode: leave `background` out."
                raise InvalidRequest(message, param="background")
            response = await self._handlers[kind](request, None)
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError  # vLLM turns cancellation into an answer
            raise_for_error(response)
        if isinstance(response, AsyncGenerator):
            return _events(response)
        if isinstance(response, dict):
            return response
        answer: dict[str, Any] = response.model_dump(
            mode="json", by_alias=True, exclude_none=kind != "responses"
        )
        return answer

    def _refuse_too_many(self, tokens: Any) -> None:
        """Before vLLM looks at each of them, on the event loop."""
        if isinstance(tokens, list) and len(tokens) > self._most:
            message = f"This model's maximum context length is {self._most} tokens; these are {len(tokens)}."
            raise ContextLengthExceeded(message, param="tokens")


async def _events(source: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    try:
        with mapped_errors():
            async for event in source:
                if isinstance(event, str):
                    yield event.encode()
                else:
                    data = event.model_dump_json(by_alias=True).encode()
                    yield b"event: " + event.type.encode() + b"\ndata: " + data + b"\n\n"
    finally:
        await source.aclose()

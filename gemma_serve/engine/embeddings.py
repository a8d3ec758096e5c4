"""vLLM's embedding handler on our supervised engine, for a model that embeds."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest
from vllm.entrypoints.pooling.embed.serving import ServingEmbedding
from vllm.entrypoints.pooling.typing import PoolingServeContext
from vllm.entrypoints.pooling.utils import get_pooling_output_encoder, get_pooling_usage
from vllm.renderers.chat_utils import ChatTemplateConfig

from ..errors import InvalidRequest
from .supervisor import Supervisor

_MOST_INPUTS = 2048  # as at OpenAI


class Embeddings(ServingEmbedding):  # type: ignore[misc]
    """Rendering, pooling and normalizing stay vLLM's; the answer is OpenAI's."""

    def __init__(self, supervisor: Supervisor, models: OpenAIServingModels, request_logger: Any) -> None:
        super().__init__(
            supervisor, models, request_logger=request_logger, chat_template_config=ChatTemplateConfig()
        )

    async def create(self, request: EmbeddingCompletionRequest, _: None) -> dict[str, Any]:
        """One vector for each input, in their order. Raises `InvalidRequest`."""
        for name in sorted(request.model_extra or {}):
            raise InvalidRequest(
                f"Unrecognized request argument supplied: {name:.100}", param=name, code="unknown_parameter"
            )
        if request.encoding_format not in ("float", "base64"):
            raise InvalidRequest("'encoding_format' is float or base64.", param="encoding_format")
        if request.input in ("", []) or (isinstance(request.input, list) and "" in request.input):
            raise InvalidRequest("'input' must not be empty.", param="input")
        inputs = request.input if isinstance(request.input, list) else [request.input]
        if len(inputs) > _MOST_INPUTS and not isinstance(inputs[0], int):
            raise InvalidRequest(
                f"'input' holds {len(inputs)} texts; send at most {_MOST_INPUTS}.", param="input"
            )
        answer: dict[str, Any] = await self(request)
        return answer

    def _build_response(self, ctx: PoolingServeContext) -> dict[str, Any]:
        request, results = ctx.request, ctx.final_res_batch
        encode = get_pooling_output_encoder(
            encoding_format=request.encoding_format,
            embed_dtype=request.embed_dtype,
            endianness=request.endianness,
        )
        usage = get_pooling_usage(results)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": encode(result)}
                for index, result in enumerate(results)
            ],
            "model": ctx.model_name,
            "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens},
        }

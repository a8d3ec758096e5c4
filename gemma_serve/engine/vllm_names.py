"""Names that vLLM has moved between 0.26 and 0.32, from where the installed one has them."""

from __future__ import annotations

from vllm.exceptions import VLLMNotFoundError, VLLMUnprocessableEntityError, VLLMValidationError

try:
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse, UsageInfo
    from vllm.entrypoints.serve.exception_handling.utils import sanitize_message
    from vllm.exceptions import GenerationError, GracefulHTTPError, RetryableRequestError, VLLMClientError
except ImportError:
    from vllm.entrypoints.openai.engine.protocol import ErrorInfo, ErrorResponse, GenerationError, UsageInfo
    from vllm.entrypoints.serve.utils.api_utils import sanitize_message

    class VLLMClientError(Exception):  # type: ignore[no-redef]
        """Not raised by this vLLM, like the next two."""

    class GracefulHTTPError(Exception):  # type: ignore[no-redef]
        http_status = 503

    class RetryableRequestError(Exception):  # type: ignore[no-redef]
        pass


try:
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
except ImportError:
    from vllm.entrypoints.openai.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest


__all__ = [
    "ErrorInfo",
    "ErrorResponse",
    "GenerationError",
    "GracefulHTTPError",
    "LoadLoRAAdapterRequest",
    "RetryableRequestError",
    "UnloadLoRAAdapterRequest",
    "UsageInfo",
    "VLLMClientError",
    "VLLMNotFoundError",
    "VLLMUnprocessableEntityError",
    "VLLMValidationError",
    "sanitize_message",
]

"""`POST /v1/chat/completions` and `POST /v1/completions`."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..cache import Origin
from ..engine.base import CacheUse, GenerationRequest, Kind
from ..errors import InvalidRequest
from ..generation import Generator
from ..logs import current_request
from ..models import Models
from ..settings import LimitsSettings, Settings
from ..token_usage import prompt_count
from .body import body_size, cache_use, parse_json, patience_of, read_bytes, require_json, validated
from .cost_caps import check_caps, default_length
from .docs import STREAMS, errors, request_schema
from .form import STREAM_HEADERS, Form, stream_form
from .request_route import RequestRoute
from .schemas import ChatCompletion, ChatCompletionBody, Completion, CompletionBody, GenerationBody
from .streaming import GenerationStream, until_disconnect

# OpenAI's parameters that cannot change Gemma's answer, accepted and dropped. `store` and `metadata` keep an
# answer in OpenAI's dashboard, `service_tier`, `prediction` and `prompt_cache_*` buy speed there.
_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# OpenAI's parameters that would change the answer, with what to use instead.
_NOT_SUPPORTED = {
    "chat_template": "a template runs code of its author, so only the operator sets it (model.chat_template)",
    "audio": "Gemma answers in text only",
    "media_io_kwargs": "it changes what reading a file costs, so only the operator sets it",
    "mm_payload": "it belongs to vLLM's render routes",
    "mm_processor_kwargs": "it changes what reading an image costs, so only the operator sets it",
    "return_mm_kwargs": "it belongs to vLLM's render routes",
    "return_token_offsets": "it belongs to vLLM's render routes",
    "routed_experts_prompt_start": "this server does not report experts",
    "function_call": "use 'tool_choice'",
    "functions": "use 'tools'",
    "suffix": "Gemma does not fill in the middle",
    "verbosity": "ask for a short or long answer in the prompt",
    "web_search_options": "this server does not search the web",
}


def router(generator: Generator, models: Models, settings: Settings) -> APIRouter:
    routes = APIRouter(tags=["generation"], route_class=RequestRoute)

    async def generate(kind: Kind, request: Request, schema: type[GenerationBody]) -> Response:
        # Before the body: who cannot be served must not have megabytes parsed.
        generator.require_room(body_size(request))
        patience = patience_of(request, settings)
        require_json(request)
        raw, cache, stream = await read_bytes(request), cache_use(request), stream_form(request)
        origin = Origin(f"{kind} {stream}", raw)
        if cache == "use" and (hit := generator.repeated(origin)) is not None:
            known: Form = hit.form
            return known.stored(hit.answer, hit.public_id)
        body = parse_json(raw, settings.limits.max_json_depth)
        checked = validated(schema, body)
        work = generation_request(kind, body, models, settings.limits, len(raw), cache)
        answers = checked.n or 1
        if stream == "text" and answers > 1:
            raise InvalidRequest(
                "'n' must be 1 for plain text, which cannot tell the answers apart.", param="n"
            )
        streams = checked.stream or stream != "events"
        if streams:
            work.body["stream"] = True
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        form = Form(kind, stream if streams else None, answers, usage)
        generation = generator.prepare(work)
        if (found := generation.found(origin, form)) is not None:
            return form.stored(found, work.public_id)
        if streams:
            return GenerationStream(generation.stream, form.writer, STREAM_HEADERS[stream], patience, answers)
        answer = await until_disconnect(request.receive, generation.complete(), patience.deadline)
        return Response(answer, media_type="application/json")

    @routes.post(
        "/v1/chat/completions",
        summary="Answer a chat",
        response_class=Response,
        responses={200: {"model": ChatCompletion, "content": STREAMS}, **errors(400, 404, 413, 415, 503)},
        openapi_extra=request_schema(ChatCompletionBody),
    )
    async def chat_completions(request: Request) -> Any:
        """OpenAI's chat completions, with vLLM's extensions; streamed when `stream` is true."""
        return await generate("chat", request, ChatCompletionBody)

    @routes.post(
        "/v1/completions",
        summary="Continue a text",
        response_class=Response,
        responses={200: {"model": Completion, "content": STREAMS}, **errors(400, 404, 413, 415, 503)},
        openapi_extra=request_schema(CompletionBody),
    )
    async def completions(request: Request) -> Any:
        """OpenAI's (legacy) completions: no chat template is applied to the prompt."""
        return await generate("completion", request, CompletionBody)

    return routes


def generation_request(
    kind: Kind,
    body: dict[str, Any],
    models: Models,
    limits: LimitsSettings,
    size: int,
    cache: CacheUse = "use",
) -> GenerationRequest:
    """What the engine gets of a validated body of `size` bytes. Raises `ServeError`."""
    _check_parameters(body, limits)
    default_length(body, limits)
    model = models.resolve(body.get("model"))
    record = current_request.get()
    if record is not None:
        record.model = model
    # A null is the same as nothing at OpenAI; vLLM refuses some.
    passed = {
        name: value for name, value in body.items() if value is not None and name not in _WITHOUT_EFFECT
    }
    answers = prompt_count(body) * (body.get("n") or 1)
    name = record.id if record else uuid.uuid4().hex
    return GenerationRequest(kind, passed, name, model, size, answers, cache)


def _check_parameters(body: dict[str, Any], limits: LimitsSettings) -> None:
    """Refuse what this server cannot do, and what one request must not cost."""
    for name in () if _NOT_SUPPORTED.keys().isdisjoint(body) else _NOT_SUPPORTED:
        if body.pop(name, None) is not None:
            raise InvalidRequest(
                f"'{name}' is not supported: {_NOT_SUPPORTED[name]}.",
                param=name,
                code="unsupported_parameter",
            )
    if (modalities := body.pop("modalities", None)) not in (None, ["text"]):
        raise InvalidRequest(
            f"'modalities' can only be [\"text\"], got {modalities!r:.60}: Gemma answers in text.",
            param="modalities",
            code="unsupported_parameter",
        )
    if (best_of := body.pop("best_of", None)) not in (None, body.get("n") or 1):
        raise InvalidRequest(
            f"'best_of' ({best_of!r:.20}) must equal 'n': the engine has no ranking of answers.",
            param="best_of",
        )
    check_caps(body, limits)

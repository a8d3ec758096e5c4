"""Builds `AsyncLLM` from the settings, and vLLM's serving classes on top of the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import difflib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from pydantic_core import SchemaValidator
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.utils.request_logger import RequestLogger
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.executor.abstract import Executor

from ..errors import ContextLengthExceeded, InvalidRequest, ServeError
from ..garbage import search_seldom
from ..settings import Settings
from .adapters import Adapters
from .arguments import CPU_EXECUTOR, chosen, engine_arguments, model_path
from .base import EngineStatus, GenerationRequest, LoadedModel, TokenStream, Usage
from .chat_template import TemplateVariables
from .direct import DirectProcessor
from .fail_fast import validator
from .families import family_of, template_text
from .greedy import RepeatedStream, copies, repeat_answer
from .identity import identity_of
from .media import register_connector
from .receiver import Receiver
from .relay import Relay, embeds, refuse_what_the_model_cannot
from .short_prompts import keep_short_prompts_here
from .step_stats import StepStats
from .supervisor import Supervisor
from .tidy_template import tidy_templates
from .traces import trace_requests
from .vllm_errors import map_error, mapped_errors, raise_for_error
from .vllm_names import GenerationError
from .vllm_serving import (
    ChatServing,
    CompletionServing,
    chat_answer,
    completion_answer,
)
from .vllm_streams import generation_failed
from .warm_up import warm_up

logger = logging.getLogger(__name__)


class LastingLLM(AsyncLLM):  # type: ignore[misc]
    """One that reads on after an error in what it does with the engine's output.

    vLLM's output handler has then failed all requests and said why, and refuses others for good.
    """

    def _run_output_handler(self) -> None:
        if self.output_handler is None:
            super()._run_output_handler()
            handler: Any = self.output_handler
            handler.add_done_callback(self._read_on)

    def _read_on(self, handler: asyncio.Task[None]) -> None:
        if not handler.cancelled() and not self.engine_core.resources.engine_dead:
            self.output_handler = None
            self._run_output_handler()


class EngineBuilder:
    """Starts vLLM's processes and loads the weights: at first, and again when they have died.

    Building blocks for as long as that takes; it is meant for a thread.
    """

    def __init__(self, settings: Settings, set_phase: Callable[[str], None]) -> None:
        envs.disable_envs_cache()  # a model before this one had other sockets
        tidy_templates()
        set_phase("reading the model's configuration")
        self._args = AsyncEngineArgs(**engine_arguments(settings))
        # Its defaults of batches depend on whom the engine serves.
        self._config = self._args.create_engine_config(UsageContext.OPENAI_API_SERVER)

    def llm(self) -> AsyncLLM:
        """The engine, with a core."""
        args = self._args
        with self._starting():
            llm = LastingLLM.from_vllm_config(
                vllm_config=copy.deepcopy(self._config),  # a core writes into it what it has measured
                enable_log_requests=args.enable_log_requests,
                aggregate_engine_logging=args.aggregate_engine_logging,
                disable_log_stats=True,  # of its own: it would count for lines that nobody has printed
                stat_loggers=None if args.disable_log_stats else [StepStats],
            )
        Receiver(llm.engine_core.resources.output_socket)
        return llm

    def core(self) -> AsyncMPClient:
        """Another core of the same kind."""
        config = copy.deepcopy(self._config)
        with self._starting():
            core = EngineCoreClient.make_async_mp_client(
                vllm_config=config,
                executor_class=Executor.get_class(config),
                log_stats=not self._args.disable_log_stats,
            )
        Receiver(core.resources.output_socket)
        return core

    def _starting(self) -> AbstractContextManager[None]:
        if self._config.parallel_config.distributed_executor_backend != CPU_EXECUTOR:
            return contextlib.nullcontext()
        from .cpu_executor import threads_placed

        return threads_placed(self._config)


class VLLMServing:
    """vLLM's request handling on the supervised engine: bodies in, answers and token streams out."""

    def __init__(self, settings: Settings, supervisor: Supervisor) -> None:
        model = settings.model
        self.supervisor = supervisor
        config, tokenizer = supervisor.model_config.hf_config, supervisor.renderer.tokenizer
        family = family_of(config.model_type, getattr(tokenizer, "chat_template", None))
        tool_parser = chosen(model.tool_parser, family.tool_parser)
        reasoning_parser = chosen(model.reasoning_parser, family.reasoning_parser)
        self._reasons = reasoning_parser is not None
        names = [BaseModelPath(name=name, model_path=model.name) for name in (model.id, *model.aliases)]
        models = OpenAIServingModels(supervisor, names)
        request_logger = RequestLogger(max_log_len=None) if settings.log.prompts else None
        shared: dict[str, Any] = {
            "request_logger": request_logger,
            "chat_template": model.chat_template.read_text()
            if model.chat_template
            else template_text(family),
            "chat_template_content_format": "auto",
            "trust_request_chat_template": False,  # a template runs code of its author: CVE-2025-62426
            "enable_auto_tools": tool_parser is not None,
            "tool_parser": tool_parser,
            "reasoning_parser": reasoning_parser or "",
        }
        self.renderer = OnlineRenderer(supervisor.model_config, supervisor.renderer, **shared)
        self.chat = ChatServing(
            supervisor,
            models,
            "assistant",
            online_renderer=self.renderer,
            enable_prompt_tokens_details=True,
            **shared,
        )
        self.completion = CompletionServing(
            supervisor,
            models,
            online_renderer=self.renderer,
            request_logger=request_logger,
            enable_prompt_tokens_details=True,
        )

        self.adapters = Adapters(supervisor, models)
        self._family = family
        self._variables = TemplateVariables(shared["chat_template"], supervisor.model_config, tokenizer)
        self.relay = Relay(supervisor, models, self.renderer, self._variables, **shared)

    def describe(self, settings: Settings) -> LoadedModel:
        """Reads the model's folder, if it is one."""
        defaults = self.chat.default_sampling_params
        identity = identity_of(settings, model_path(settings), defaults)
        config = self.supervisor.model_config.hf_config
        media = {"image": "vision_config", "audio": "audio_config"}
        more = [name for name, part in media.items() if getattr(config, part, None) is not None]
        temperature = defaults.get("temperature", 1.0)
        return LoadedModel(identity, temperature, self._family.name, ("text", *more))

    async def complete(self, request: GenerationRequest) -> tuple[dict[str, Any], Usage]:
        with mapped_errors():
            response = await self._create(request)
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError  # vLLM turns cancellation into an answer
            raise_for_error(response)
            answer, usage = (chat_answer if request.kind == "chat" else completion_answer)(response)
        n = self._copies(request)
        return repeat_answer(answer, usage, n) if n > 1 else (answer, usage)

    async def stream(self, request: GenerationRequest) -> TokenStream:
        with mapped_errors():
            response = await self._create(request)
            raise_for_error(response)
        stream: TokenStream = response
        n = self._copies(request)
        return RepeatedStream(stream, n) if n > 1 else stream

    def _copies(self, request: GenerationRequest) -> int:
        return copies(request.body, self.chat.default_sampling_params.get("temperature", 1.0))

    async def _create(self, request: GenerationRequest) -> Any:
        try:
            return await self._call(request)
        except Exception as error:
            raise self._mapped(error, request) from error.with_traceback(None)

    def _mapped(self, error: Exception, request: GenerationRequest) -> ServeError:
        constrained = bool(request.body.get("structured_outputs") or request.body.get("response_format"))
        failed = isinstance(error, GenerationError)
        mapped = generation_failed(constrained) if failed else map_error(error)
        if isinstance(mapped, ContextLengthExceeded):
            mapped.param = "messages" if request.kind == "chat" else "prompt"
        return mapped

    async def _call(self, request: GenerationRequest) -> Any:
        body = request.body | {"model": request.model}
        body.setdefault("request_id", request.request_id)
        refuse_what_the_model_cannot(request.kind, embeds(self.supervisor))
        self._variables.check(body.get("chat_template_kwargs"))
        self._refuse_ineffective(body)
        if self._copies(request) > 1:
            body["n"] = 1
        if request.kind == "chat":
            return await self.chat.create_chat_completion(_validated(ChatCompletionRequest, body))
        return await self.completion.create_completion(_validated(CompletionRequest, body))

    def _refuse_ineffective(self, body: dict[str, Any]) -> None:
        """What vLLM would ignore with this model and these settings."""
        if body.get("priority") and self.supervisor.vllm_config.scheduler_config.policy != "priority":
            raise InvalidRequest(
                "'priority' has no effect here: the server runs with engine.scheduling_policy=fcfs.",
                param="priority",
            )
        config = self.supervisor.vllm_config
        for name, transfer in (
            ("kv_transfer_params", config.kv_transfer_config),
            ("ec_transfer_params", config.ec_transfer_config),
        ):
            if body.get(name) and transfer is None:
                raise InvalidRequest(
                    f"{name!r} has no effect here: engine.{name[:11]}_config is not set.", param=name
                )
        for name in {"kv_transfer_params", "ec_transfer_params"} & (body.get("vllm_xargs") or {}).keys():
            raise InvalidRequest(f"'vllm_xargs' must not hold {name!r}.", param="vllm_xargs")
        if body.get("reasoning_effort") not in (None, "none") and not self._reasons:
            raise InvalidRequest(
                "'reasoning_effort' has no effect here: this model does not reason, or the server runs "
                "without the setting model.reasoning_parser.",
                param="reasoning_effort",
            )


R = TypeVar("R", ChatCompletionRequest, CompletionRequest)
_VALIDATORS: dict[type, SchemaValidator] = {
    model: validator(model) for model in (ChatCompletionRequest, CompletionRequest)
}


def _validated(model: type[R], body: dict[str, Any]) -> R:
    """vLLM's request object. A misspelt parameter, which vLLM would ignore, is refused."""
    for name in sorted(body.keys() - model.model_fields.keys()):
        near = difflib.get_close_matches(name, model.model_fields, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InvalidRequest(
            f"Unrecognized request argument supplied: {name}.{hint}", param=name, code="unknown_parameter"
        )
    try:
        validated: R = _VALIDATORS[model].validate_python(body)
        return validated
    except (AttributeError, KeyError, RecursionError) as error:
        # vLLM's validators see the raw body and expect the right types in it.
        raise InvalidRequest(f"The request holds a value of the wrong type: {error}.") from error


async def serve(settings: Settings, llm: AsyncLLM, status: EngineStatus) -> VLLMServing:
    """Put the serving classes on a loaded engine; runs on the event loop that will use it."""
    register_connector()
    envs.enable_envs_cache()  # vLLM looks them up for every request and step: a tenth of this process's time
    llm.output_processor.__class__ = DirectProcessor  # which its output loop has already
    supervisor = Supervisor(llm, status)
    supervisor.flushes.longest = settings.performance.flush_ms / 1000
    await llm.reset_mm_cache()
    await llm.get_supported_tasks()  # asked once, so that no request has to ask an engine that is down
    if settings.otel.url is not None:
        trace_requests(llm, settings.otel.url)
    keep_short_prompts_here(llm.renderer)
    serving = VLLMServing(settings, supervisor)
    renders = serving.renderer if hasattr(serving.renderer, "warmup") else serving.chat  # as in vLLM 0.26
    await asyncio.to_thread(renders.warmup)
    await warm_up(llm, settings.loading.warm_up_requests)
    search_seldom()
    return serving

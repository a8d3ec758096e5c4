"""What we use of vLLM's internals is still there: the first test to run when vLLM is upgraded."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import os
import subprocess
import sys
from typing import Any

import prometheus_client
import pytest
import vllm
from vllm import exceptions
from vllm.distributed.device_communicators import shm_broadcast
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, async_llm
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources, EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from gemma_serve import engine_fields
from gemma_serve.engine.installed import vllm_version
from gemma_serve.engine.resume import STATELESS
from gemma_serve.engine.supervisor import Supervisor
from gemma_serve.engine.vllm_errors import map_error, raise_for_error
from gemma_serve.engine.vllm_names import (
    ErrorInfo,
    ErrorResponse,
    LoadLoRAAdapterRequest,
    UnloadLoRAAdapterRequest,
)
from gemma_serve.engine.vllm_serving import ChatServing, CompletionServing
from gemma_serve.errors import InvalidRequest, ModelNotFound, NotImplementedHere, ServeError, Unavailable


def test_the_engine_fields_are_those_of_this_vllm() -> None:
    if vllm.__version__.split("+")[0] != engine_fields.VLLM_VERSION:
        pytest.skip(f"the list is of vLLM {engine_fields.VLLM_VERSION}; `make lock` renews it")
    names = {field.name for field in dataclasses.fields(AsyncEngineArgs) if not field.name.startswith("_")}
    assert set(engine_fields.ENGINE_FIELDS) == names


def test_the_version_told_is_vllms() -> None:
    assert (vllm_version() or "").split("+")[0] == vllm.__version__.split("+")[0]


def test_the_supervisor_has_the_whole_interface() -> None:
    assert not inspect.isabstract(Supervisor)
    for name in EngineClient.__abstractmethods__:
        assert name in vars(Supervisor), name
    assert issubclass(Supervisor, abc.ABC)


def test_the_supervisor_takes_what_async_llm_takes() -> None:
    assert list(inspect.signature(AsyncLLM.generate).parameters)[1:4] == [
        "prompt",
        "sampling_params",
        "request_id",
    ]
    assert "self.output_handler" in inspect.getsource(AsyncLLM._run_output_handler)
    for name in ("shutdown", "reset_mm_cache", "abort", "from_vllm_config", "remove_lora"):
        assert callable(getattr(AsyncLLM, name))
    assert isinstance(inspect.getattr_static(AsyncLLM, "errored"), property)


def test_the_core_can_be_replaced() -> None:
    for name in ("get_output_async", "add_request_async", "abort_requests_async"):
        assert inspect.iscoroutinefunction(getattr(AsyncMPClient, name))
        assert f"engine_core.{name}(" in inspect.getsource(async_llm)
    assert {"vllm_config", "executor_class", "log_stats"} <= set(
        inspect.signature(EngineCoreClient.make_async_mp_client).parameters
    )
    assert {"engine_dead", "engine_manager"} <= {
        field.name for field in dataclasses.fields(BackgroundResources)
    }
    assert "self.processes" in inspect.getsource(CoreEngineProcManager.__init__)
    # What `Receiver` takes over, and that nothing else reads.
    ensure = inspect.getsource(AsyncMPClient._ensure_output_queue_task)
    assert ensure.count("output_socket.") == 1
    assert "output_socket = resources.output_socket" in ensure
    assert "await output_socket.recv_multipart(copy=False)" in ensure
    assert "self.engine_core.resources.engine_dead" in inspect.getsource(AsyncLLM.errored.fget)
    assert {"tokenizer", "request", "prompt", "parent_req", "request_index", "queue", "log_stats"} <= set(
        inspect.signature(RequestState.from_new_request).parameters
    )


def test_an_executor_for_a_cpu_can_sleep() -> None:
    queue, condition = shm_broadcast.MessageQueue, shm_broadcast.SpinCondition
    assert "self.last_read + self.busy_loop_s" in inspect.getsource(condition.wait)
    assert "self._spin_condition.wait(" in inspect.getsource(queue.acquire_read)
    assert "self._spin_condition.record_read()" in inspect.getsource(queue)
    assert "self.response_mqs.append(" in inspect.getsource(MultiprocExecutor._init_executor)


def test_the_output_loop_takes_a_processor_of_our_own() -> None:
    assert list(inspect.signature(OutputProcessor.process_outputs).parameters)[1:4] == [
        "engine_core_outputs",
        "engine_core_timestamp",
        "iteration_stats",
    ]
    assert "output_processor.process_outputs(" in inspect.getsource(AsyncLLM._run_output_handler)
    known = {
        *("request_id", "new_token_ids", "finish_reason", "stop_reason", "events", "trace_headers"),
        *("new_logprobs", "new_prompt_logprobs_tensors", "prompt_token_id_logprobs", "pooling_output"),
        *("kv_transfer_params", "ec_transfer_params", "prefill_stats", "routed_experts"),
        *("num_nans_in_logits", "mm_cache_miss_hashes", "new_sampling_mask", "spec_decode_metrics"),
    }
    assert set(EngineCoreOutput.__struct_fields__) == known  # another may be one that direct.py must not drop


def test_a_request_can_be_traced() -> None:
    from vllm.tracing import extract_trace_context

    assert extract_trace_context({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
    assert list(inspect.signature(OutputProcessor.do_tracing).parameters)[1:] == [
        "engine_core_output",
        "req_state",
        "iteration_stats",
    ]
    assert "if self.tracing_enabled" in inspect.getsource(OutputProcessor.process_outputs)
    assert "self.observability_config.otlp_traces_endpoint" in inspect.getsource(AsyncLLM.add_request)


def test_every_sampling_parameter_has_been_thought_of() -> None:
    # Each of these keeps a state in the sampler, or nobody knows: see engine/resume.py.
    with_a_state = {
        *("presence_penalty", "frequency_penalty", "bad_words", "_bad_words_token_ids"),
        *("structured_outputs", "thinking_token_budget", "repetition_detection"),
        *("extra_args", "watermarking", "routed_experts_prompt_start", "trace_decode_token_ids"),
    }
    assert set(SamplingParams.__struct_fields__) == STATELESS | with_a_state


@pytest.mark.parametrize(
    ("ours", "base", "method"),
    [
        (ChatServing, OpenAIServingChat, "chat_completion_stream_generator"),
        (CompletionServing, OpenAIServingCompletion, "completion_stream_generator"),
    ],
)
def test_the_overridden_step_has_the_same_first_parameters(ours: type, base: type, method: str) -> None:
    def names(cls: type) -> list[str]:
        parameters = inspect.signature(getattr(cls, method)).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert names(base)[: len(names(ours))] == names(ours)
    assert "request_metadata" in names(base)


def leaves(cls: type[BaseException]) -> list[type[BaseException]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in leaves(child))]


def make(cls: type[Any]) -> BaseException:
    """An instance without the constructor, whose arguments differ from class to class."""
    error: Any = cls.__new__(cls, "something is wrong")
    error.__dict__.update(parameter=None, http_status=503, message="something is wrong")
    assert isinstance(error, BaseException)
    return error


@pytest.mark.parametrize("cls", leaves(exceptions.VLLMError), ids=lambda cls: cls.__name__)
def test_every_vllm_exception_has_an_answer(cls: type[BaseException]) -> None:
    mapped = map_error(make(cls))
    if issubclass(cls, exceptions.VLLMClientError):
        assert isinstance(mapped, InvalidRequest)
    elif issubclass(cls, EngineDeadError | exceptions.RetryableRequestError):
        assert isinstance(mapped, Unavailable)
    elif issubclass(cls, exceptions.GracefulHTTPError):
        assert mapped.status in (409, 500, 503)
    else:
        assert mapped.status == 500
    assert mapped.message


def test_a_wrapped_error_is_unwrapped() -> None:
    try:
        raise EngineGenerateError() from ValueError("n must be 1")
    except EngineGenerateError as error:
        mapped = map_error(error)
    assert isinstance(mapped, InvalidRequest)
    assert mapped.message == "n must be 1"


def test_what_cannot_be_read_for_want_of_a_library_is_told() -> None:
    """vLLM's own words where sound comes and `vllm[audio]` is not installed."""
    mapped = map_error(ImportError("Please install vllm[audio] for audio support."))
    assert isinstance(mapped, NotImplementedHere) and "vllm[audio]" in mapped.message


def test_no_path_or_flag_of_vllm_reaches_a_client() -> None:
    mapped = map_error(ValueError("bad file /home/someone/models/x.json; set --enable-prompt-embeds"))
    assert mapped.message == "bad file <path>; set engine.enable_prompt_embeds"


def test_error_answers() -> None:
    def answer(code: int, param: str | None = None) -> ErrorResponse:
        return ErrorResponse(error=ErrorInfo(message="m", type="t", code=code, param=param))

    for response, wanted in (
        (answer(404, "model"), ModelNotFound),
        (answer(400), InvalidRequest),
        (answer(503), Unavailable),
        (answer(500), ServeError),
    ):
        with pytest.raises(wanted):
            raise_for_error(response)


def test_what_the_report_reads_is_there() -> None:
    from vllm.config import CacheConfig
    from vllm.v1.metrics import loggers
    from vllm.v1.metrics.stats import SchedulerStats

    read = {"num_running_reqs", "num_waiting_reqs", "kv_cache_usage"}
    assert read <= SchedulerStats.__dataclass_fields__.keys()
    assert "kv_cache_memory_bytes" in CacheConfig.__dataclass_fields__
    assert '"vllm:generation_tokens"' in inspect.getsource(loggers)
    assert loggers.PrometheusStatLogger._counter_cls is prometheus_client.Counter


def test_the_engine_gets_the_batches_that_vllms_own_server_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200; on a CPU whom it serves makes no difference."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from gemma_serve.engine.node import Node
    from gemma_serve.engine.vllm_engine import EngineBuilder
    from gemma_serve.settings import Settings

    monkeypatch.setattr(current_platform, "get_device_total_memory", lambda device_id=0: 139 << 30)
    monkeypatch.setattr(current_platform, "get_device_name", lambda device_id=0: "NVIDIA H200")
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    batches = EngineArgs.get_batch_defaults(1)
    monkeypatch.undo()
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(EngineArgs, "get_batch_defaults", lambda *args: batches)
    settings = Settings(model={"name": "gemma-demo"})
    spread = {"nnodes": 2, "node_rank": 1, "master_addr": "x", "tensor_parallel_size": 2}
    node = Node(Settings(model=settings.model, engine=spread))
    for config in (EngineBuilder(settings, print)._config, node._prepare()):
        scheduler = config.scheduler_config
        assert (scheduler.max_num_batched_tokens, scheduler.max_num_seqs) == (8192, 1024)


def test_models_can_be_changed() -> None:
    from vllm import envs
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.platforms.cpu import CpuPlatform
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.inputs.preprocess import parse_model_prompt
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    assert callable(envs.disable_envs_cache)
    assert "unregister_vllm_metrics()" in inspect.getsource(PrometheusStatLogger.__init__)
    for name in ("sleep", "wake_up", "remove_lora", "reset_prefix_cache", "collective_rpc"):
        assert inspect.iscoroutinefunction(getattr(AsyncLLM, name)), name
    assert list(inspect.signature(AsyncLLM.sleep).parameters)[1] == "level"
    assert list(inspect.signature(AsyncLLM.wake_up).parameters)[1] == "tags"
    for name in ("load_lora_adapter", "unload_lora_adapter"):
        assert inspect.iscoroutinefunction(getattr(OpenAIServingModels, name)), name
    assert {"lora_name", "lora_path"} <= LoadLoRAAdapterRequest.model_fields.keys()
    assert "lora_name" in UnloadLoRAAdapterRequest.model_fields
    assert list(inspect.signature(parse_model_prompt).parameters) == ["model_config", "prompt"]
    assert list(inspect.signature(BaseRenderer.render_cmpl).parameters)[1] == "prompts"
    assert not CpuPlatform().is_sleep_mode_available()


def test_vllm_is_imported_without_the_compiler_where_there_is_none() -> None:
    """`vllm_import.py` counts on vLLM's doing without what it imports only to patch it."""
    code = (
        "import gc, sys; from gemma_serve.engine import vllm_import; before = gc.get_threshold(); "
        "vllm_import.begin(); vllm_import.end(); assert gc.get_threshold() == before; "
        "assert 'vllm' in sys.modules; sys.exit('torch._inductor.lowering' in sys.modules)"
    )
    environ = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

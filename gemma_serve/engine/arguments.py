"""From the settings to the arguments of vLLM's engine: what is derived, and what is refused before a load."""

from __future__ import annotations

import difflib
import logging
import os
from typing import Any

import psutil
import torch
import vllm.config
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.transformers_utils.config import get_config

from .. import demo_model
from ..engine_fields import ENGINE_FIELDS
from ..errors import StartupError
from ..settings import DEMO_MODEL, Settings
from .families import family_of, precision

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_SIZES = (
    "nnodes",
    "data_parallel_size",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "tensor_parallel_size",
)
_TRANSFERS = {"kv_transfer_config", "kv_offloading_size", "ec_transfer_config", "data_parallel_backend"}
CPU_EXECUTOR = "gemma_serve.engine.cpu_executor.CPUExecutor"


def engine_arguments(settings: Settings) -> dict[str, Any]:
    """Keyword arguments of `AsyncEngineArgs`; what `engine:` sets wins over what is derived here."""
    model, performance = settings.model, settings.performance
    _check_device(performance.device)
    _check_parsers(settings)
    values: dict[str, Any] = {
        "model": model_path(settings),
        "served_model_name": [model.id, *model.aliases],
        "dtype": _dtype(settings),
        "max_model_len": model.max_length,
        "max_logprobs": settings.limits.max_logprobs,
    }
    if (
        parser := chosen(model.reasoning_parser, family_of(_model_type(settings)).reasoning_parser)
    ) is not None:
        values["reasoning_parser"] = parser
    if current_platform.is_cpu():
        values |= _cpu_defaults(settings.engine)
    values |= {name: _configuration(name, value) for name, value in settings.engine.items()}
    if model.temperature is not None:
        overridden = settings.engine.get("override_generation_config") or {}
        values["override_generation_config"] = {"temperature": model.temperature, **overridden}
    return values


def _configuration(name: str, value: Any) -> Any:
    """vLLM makes its configuration objects of dicts for some of its arguments; this is for all of them."""
    kind = getattr(vllm.config, ENGINE_FIELDS[name], None)
    return value if kind is None or not isinstance(value, dict) else kind(**value)


def model_path(settings: Settings) -> str:
    name = settings.model.name
    return str(demo_model.PATH) if name == DEMO_MODEL else name


def _model_config(settings: Settings) -> Any:
    engine = settings.engine
    trust = bool(engine.get("trust_remote_code"))
    return get_config(model_path(settings), trust, engine.get("revision"))


def _model_type(settings: Settings) -> str:
    return str(_model_config(settings).model_type)


def _dtype(settings: Settings) -> str:
    wanted, config = settings.performance.precision, _model_config(settings)
    family = family_of(str(config.model_type))
    dtype = precision(wanted, family, has_bfloat16=torch.bfloat16 in current_platform.supported_dtypes)
    if dtype != wanted:
        logger.warning("%s overflows %s; using %s in its place", family.name, wanted, dtype)
    published = config.get_text_config().dtype
    if dtype == "auto" and published == torch.bfloat16 and current_platform.is_cpu() and not _fast_bfloat16():
        logger.warning(
            "This CPU has no instructions for bfloat16, which the model is in: with "
            "GEMMA_PERFORMANCE_PRECISION=float32 it may be twice as fast, and takes twice the memory"
        )
    return dtype


def _fast_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _check_parsers(settings: Settings) -> None:
    """Before the weights are loaded, which takes minutes."""
    for name, setting, known in (
        ("tool_parser", settings.model.tool_parser, ToolParserManager.list_registered()),
        ("reasoning_parser", settings.model.reasoning_parser, ReasoningParserManager.list_registered()),
    ):
        if setting not in ("auto", "none", *known):
            near = difflib.get_close_matches(setting, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(known))}"
            raise StartupError(f"model.{name} = {setting!r}: vLLM has no such parser{hint}")


def chosen(setting: str, of_family: str | None) -> str | None:
    """The parser that a setting names: `auto` is the family's, `none` is none."""
    return {"auto": of_family, "none": None}.get(setting, setting)


def _check_device(device: str) -> None:
    built_for = current_platform.device_type
    if device not in ("auto", built_for):
        raise StartupError(
            f"GEMMA_PERFORMANCE_DEVICE={device}, but this vLLM runs on {built_for or 'no device here'}: "
            f"install the other with `GEMMA_SETUP={device} make setup`, or leave the setting at `auto`"
        )


def _cpu_defaults(engine: dict[str, Any]) -> dict[str, Any]:
    # A request with a seed that shares a step with a chunked prefill kills the engine on CPU ("CPU Generator
    # does not use offset"); without chunked prefill vLLM sets max_num_batched_tokens >= max_model_len itself.
    values: dict[str, Any] = {"enable_chunked_prefill": False}
    if not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & engine.keys():
        values["kv_cache_memory_bytes"] = min(4 * _GIB, psutil.virtual_memory().total // 4)
    alone = all(engine.get(name, 1) == 1 for name in _SIZES)
    # With the others, vLLM asks for its own by name.
    if alone and not _TRANSFERS & engine.keys():
        values["distributed_executor_backend"] = CPU_EXECUTOR
    # Leave a core to this process, or every token waits for the scheduler of the operating system.
    if (os.cpu_count() or 1) > 1:
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")
    return values

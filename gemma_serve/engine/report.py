"""What the running engine says of itself, read without asking it."""

from __future__ import annotations

import functools
import logging
import statistics
from typing import Any

from prometheus_client import REGISTRY
from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml
from vllm.v1.engine.async_llm import AsyncLLM

from .base import Device, EngineReport, GpuMemory
from .core import ReplaceableCore
from .processes import Footprint

logger = logging.getLogger(__name__)

_GENERATED = "vllm:generation_tokens_total"


def report(llm: AsyncLLM, core: ReplaceableCore, footprint: Footprint | None) -> EngineReport:
    stats = core.scheduler_stats.values()
    per_device = llm.vllm_config.cache_config.kv_cache_memory_bytes
    count = _devices(llm)
    return EngineReport(
        running=sum(each.num_running_reqs for each in stats),
        waiting=sum(each.num_waiting_reqs for each in stats),
        kv_cache_use=statistics.mean(each.kv_cache_usage for each in stats) if stats else None,
        kv_cache_bytes=None if per_device is None else int(per_device) * count,
        generated_tokens=_generated_tokens(),
        resumed=core.resumed_total,
        processes=footprint.process_ids if footprint else (),
        device=_device(count),
    )


def gpu_memory(llm: AsyncLLM) -> list[GpuMemory]:
    """By NVML: PyTorch would take half a gigabyte of the GPU for a context of this process."""
    if not current_platform.is_cuda():
        return []
    found = []
    try:
        nvml = _nvml()
        for index in range(_devices(llm)):
            handle = nvml.nvmlDeviceGetHandleByIndex(current_platform.device_id_to_physical_device_id(index))
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(GpuMemory(int(memory.used), int(memory.total)))
    except Exception:  # no NVML, a part of a GPU (MIG), GPUs of other nodes
        logger.debug("The GPUs' memory cannot be read", exc_info=True)
    return found


def _devices(llm: AsyncLLM) -> int:
    engines = len(llm.engine_core.engine_ranks_managed)  # data parallel ones
    return int(llm.vllm_config.parallel_config.world_size) * engines


@functools.cache
def _nvml() -> Any:
    nvml = import_pynvml()
    nvml.nvmlInit()
    return nvml


@functools.cache
def _device(count: int) -> Device:
    kind = str(current_platform.device_type)
    try:
        name = str(current_platform.get_device_name())
    except Exception:  # as above
        name = kind
    return Device(kind, name, count, bool(current_platform.is_cuda()))


def _generated_tokens() -> int | None:
    """vLLM counts them at every step; None with engine.disable_log_stats."""
    found = [
        sample.value
        for family in REGISTRY.restricted_registry([_GENERATED]).collect()
        for sample in family.samples
        if sample.name == _GENERATED
    ]
    return int(sum(found)) if found else None

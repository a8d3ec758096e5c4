"""vLLM's engine on a CPU, in one process less."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from contextlib import AbstractContextManager

from vllm import envs
from vllm.config import VllmConfig
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from ..errors import StartupError
from .cpu_sampling import sort_less


class CPUExecutor(UniProcExecutor):  # type: ignore[misc]
    """Computes in the engine core's own process, as on a GPU.

    For a CPU vLLM starts a worker beside the core, because a process has to be told before it starts where
    its OpenMP threads belong. That takes seconds and half a gigabyte, and of two cores the second: the core
    looks all the time whether the worker has done its step. Here the core is told: see `threads_placed`.
    """

    def _init_executor(self) -> None:
        sort_less()
        super()._init_executor()
        _let_threads_go(os.sched_getaffinity(os.getppid()))


def _let_threads_go(cpus: Collection[int]) -> None:
    """What is no computing runs anywhere: sockets, grammars. Else it would inherit OpenMP's first CPU."""
    run = threading.Thread.run

    def run_anywhere(thread: threading.Thread) -> None:
        os.sched_setaffinity(0, cpus)
        run(thread)

    threading.Thread.run = run_anywhere  # type: ignore[method-assign, assignment]


def threads_placed(config: VllmConfig) -> AbstractContextManager[None]:
    """A core that is started inside has its threads where vLLM's worker would: away from a reserved CPU."""
    try:
        manager = OMPProcessManager(config)
    except (AssertionError, ValueError) as error:
        given = envs.VLLM_CPU_OMP_THREADS_BIND
        reason = str(error) or "that is not understood"
        raise StartupError(f"VLLM_CPU_OMP_THREADS_BIND={given}: {reason}") from error
    placed: AbstractContextManager[None] = manager.configure_omp_envs(0, 0)
    return placed

"""On a CPU the engine is one process, leaves the server a CPU of its own, and tells what would be faster."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.executor.abstract import Executor

from gemma_serve.engine.arguments import engine_arguments
from gemma_serve.engine.cpu_executor import CPUExecutor, threads_placed
from gemma_serve.errors import StartupError
from gemma_serve.settings import Settings

from .conftest import ServerProcess
from .processes import below

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM runs on another device here")


def backend(**engine: Any) -> Any:
    arguments = engine_arguments(Settings(model={"name": "gemma-demo"}, engine=engine))
    return arguments.get("distributed_executor_backend")


def test_it_is_ours_unless_another_is_asked_for_or_needed() -> None:
    config = SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend=backend()))
    assert Executor.get_class(config) is CPUExecutor
    assert backend(tensor_parallel_size=1) == backend()
    assert backend(distributed_executor_backend="mp") == "mp"
    assert backend(tensor_parallel_size=2) is None
    assert backend(data_parallel_size=2) is None
    assert backend(data_parallel_backend="ray") is None
    assert backend(kv_offloading_size=1) is None


def test_the_engine_is_one_process_beside_a_free_cpu(live: ServerProcess) -> None:
    api = psutil.Process(live.process.pid)
    (engine,) = below(api.pid, "EngineCore")
    assert not engine.children()
    assert os.getpgid(engine.pid) != os.getpgid(api.pid), "Ctrl-C would end it"
    if (os.cpu_count() or 1) > 1:
        anywhere = os.sched_getaffinity(api.pid)
        assert anywhere - os.sched_getaffinity(engine.pid)
        threads = [os.sched_getaffinity(thread.id) for thread in engine.threads()]
        assert anywhere in threads, "not even the threads of its sockets leave the computing its CPU"


def test_a_wrong_place_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by the environment: vLLM remembers it for good once an engine ran in this process.
    monkeypatch.setitem(vars(envs), "VLLM_CPU_OMP_THREADS_BIND", "first")
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            local_world_size=1, data_parallel_rank_local=None, _api_process_count=1
        ),
        kv_transfer_config=None,
    )
    with pytest.raises(StartupError, match="VLLM_CPU_OMP_THREADS_BIND=first: invalid literal"):
        threads_placed(config)


@pytest.mark.parametrize(
    ("fast", "precision", "told"), [(False, "auto", True), (True, "auto", False), (False, "float32", False)]
)
def test_a_cpu_without_bfloat16_is_told(
    fast: bool,
    precision: str,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("gemma_serve.engine.arguments._fast_bfloat16", lambda: fast)
    engine_arguments(Settings(model={"name": "gemma-demo"}, performance={"precision": precision}))
    assert ("GEMMA_PERFORMANCE_PRECISION=float32" in caplog.text) is told

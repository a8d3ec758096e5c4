"""Which executor vLLM gets on a CPU, and that it sleeps while its worker computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.platforms import current_platform
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from gemma_serve.engine.arguments import engine_arguments
from gemma_serve.engine.cpu_executor import CPUExecutor
from gemma_serve.settings import Settings

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM runs on another device here")


def backend(**engine: Any) -> Any:
    arguments = engine_arguments(Settings(model={"name": "gemma-demo"}, engine=engine))
    return arguments.get("distributed_executor_backend")


def test_it_is_ours_unless_another_is_asked_for_or_needed() -> None:
    config = SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend=backend()))
    assert Executor.get_class(config) is CPUExecutor
    assert backend(tensor_parallel_size=2) == backend()
    assert backend(distributed_executor_backend="mp") == "mp"
    assert backend(pipeline_parallel_size=2) is None
    assert backend(data_parallel_backend="ray") is None


def test_it_looks_again_and_again_only_while_steps_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    condition = SpinCondition(False, zmq.Context.instance(), "inproc://test-cpu-executor")
    near, elsewhere = SimpleNamespace(_spin_condition=condition), SimpleNamespace(_spin_condition=None)

    def start(self: Any) -> None:
        self.response_mqs = [near, elsewhere]

    monkeypatch.setattr(MultiprocExecutor, "_init_executor", start)
    executor = object.__new__(CPUExecutor)
    executor._init_executor()
    executor.response_mqs = []
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    spins = []
    for seconds in (5, 0.01, 0.01, 0.4, 0.4, 0.01):
        now += seconds
        condition.record_read()
        spins.append(condition.busy_loop_s > 0)
    waits: list[int | None] = []
    monkeypatch.setattr(SpinCondition, "wait", lambda self, timeout_ms=None: waits.append(timeout_ms))
    condition.wait()
    condition.wait(5000)
    condition.wait(0)
    condition.local_notify_socket.close()
    assert waits == [2, 2, 0]  # a notice may be lost
    assert spins == [False, True, True, False, False, True]
    assert condition.last_read == now

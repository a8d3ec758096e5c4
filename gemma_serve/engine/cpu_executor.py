"""vLLM's executor for a CPU, without the core that it spends on waiting."""

from __future__ import annotations

import time
from typing import Final

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

_SHORT_STEP: Final = 0.02
"""Seconds. To a step for one stream, waking up would add a tenth; to one for many, next to nothing."""


class CPUExecutor(MultiprocExecutor):  # type: ignore[misc]
    """Sleeps while its workers take long.

    vLLM's looks for their answer again and again for a whole second after the last one, so all the time: of
    two cores, where the worker has one, three quarters of the other, which the server and its clients need.
    """

    def _init_executor(self) -> None:
        super()._init_executor()
        for queue in self.response_mqs:
            if queue._spin_condition is not None:
                queue._spin_condition.__class__ = Patience


_LOOK_AGAIN_MS: Final = 2


class Patience(SpinCondition):  # type: ignore[misc]
    """Looks again and again only while steps are short."""

    last_read: float

    def record_read(self) -> None:
        now = time.monotonic()
        self.busy_loop_s = _SHORT_STEP if now - self.last_read < _SHORT_STEP else 0
        self.last_read = now

    def wait(self, timeout_ms: int | None = None) -> None:
        # zmq drops a notice that follows another too soon; vLLM would then sleep for seconds.
        super().wait(_LOOK_AGAIN_MS if timeout_ms is None else min(timeout_ms, _LOOK_AGAIN_MS))

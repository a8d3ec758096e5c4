"""vLLM's executor for a CPU, without the core that it spends on waiting."""

from __future__ import annotations

from typing import Final

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

_SPIN_SECONDS: Final = 0.02
"""Longer than a step for one stream, to which waking up would add a tenth."""


class CPUExecutor(MultiprocExecutor):  # type: ignore[misc]
    """Sleeps while its workers take long.

    vLLM's looks for their answer again and again for a whole second after the last one, so all the time: of
    two cores, where the worker has one, three quarters of the other, which the server and its clients need.
    """

    def _init_executor(self) -> None:
        super()._init_executor()
        for queue in self.response_mqs:
            if queue._spin_condition is not None:
                queue._spin_condition.busy_loop_s = _SPIN_SECONDS

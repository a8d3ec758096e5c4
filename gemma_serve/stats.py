"""How busy the server is: rates, memory and CPU, sampled each second, and a line in the log now and then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import AsyncIterator

import psutil

from .admission import Admission
from .cache import ResponseCache
from .engine.base import Engine, GpuMemory
from .periodic import every

logger = logging.getLogger(__name__)

_SAMPLE_SECONDS = 1.0
_LONGEST_RATE_SECONDS = 60
_MEMORY_EVERY = 5  # samples; memory does not move fast, and asking the GPU takes a thread


class Stats:
    """Samples while it is `running`; reading costs microseconds."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        log_seconds: float,
        cache: ResponseCache | None = None,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._log_seconds = log_seconds
        self._cache = cache
        self._cached: Counter[str] = Counter()
        self._tokens: deque[tuple[float, int]] = deque(
            maxlen=round(_LONGEST_RATE_SECONDS / _SAMPLE_SECONDS) + 1
        )
        self._processes: dict[int, psutil.Process] = {}
        self._samples = 0
        self._logged: tuple[float, int] | None = None
        self.rss_bytes = 0
        """Resident memory of this process and the engine's; what they share is counted for each."""
        self.cpu_percent = 0.0
        """Of them together; 100 is one core."""
        self.gpus: list[GpuMemory] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        lines = every(self._log_seconds, self._log) if self._log_seconds else contextlib.nullcontext()
        async with every(_SAMPLE_SECONDS, self._sample), lines:
            yield

    def tokens_per_second(self, seconds: float) -> float | None:
        """Generated over the last `seconds`, at most 60; None where nobody counts them."""
        if not self._tokens:
            return None
        now, generated = self._tokens[-1]
        since, before = next(sample for sample in self._tokens if sample[0] >= now - seconds - 0.5)
        # A model that is loaded counts from 0 again.
        return max(0, generated - before) / (now - since) if now > since else 0.0

    async def _sample(self) -> None:
        report = self._engine.report()
        if report.generated_tokens is not None:
            self._tokens.append((time.monotonic(), report.generated_tokens))
        if self._samples % _MEMORY_EVERY == 0:
            await asyncio.to_thread(self._measure, (os.getpid(), *report.processes))
            self.gpus = await asyncio.to_thread(self._engine.gpu_memory)
        self._samples += 1

    def _measure(self, ids: tuple[int, ...]) -> None:
        for gone in self._processes.keys() - set(ids):
            del self._processes[gone]
        rss, cpu = 0, 0.0
        for id in ids:
            with contextlib.suppress(psutil.Error):
                process = self._processes.get(id) or psutil.Process(id)
                self._processes[id] = process
                rss += process.memory_info().rss
                cpu += process.cpu_percent()  # since the last time
        self.rss_bytes, self.cpu_percent = rss, round(cpu, 1)

    def _cached_since(self) -> Counter[str]:
        """What the response cache did since the last time."""
        if self._cache is None:
            return Counter()
        before, self._cached = self._cached, self._cache.outcomes.copy()
        return self._cached - before

    async def _log(self) -> None:
        """A line, unless nothing has happened since the last one."""
        report, admission, now = self._engine.report(), self._admission, time.monotonic()
        before, self._logged = self._logged, (now, report.generated_tokens or 0)
        generated = max(0, self._logged[1] - before[1]) if before else 0
        cached = self._cached_since()
        if before is None or not (generated or cached or admission.running or admission.waiting):
            return
        words = [
            f"{admission.running} running",
            f"{admission.waiting} waiting",
            f"{generated / (now - before[0]):.1f} tokens/s",
        ]
        if report.kv_cache_use is not None:
            words.append(f"KV cache {report.kv_cache_use:.1%}")
        if cached:
            words.append(f"{cached['hit']} of {sum(cached.values())} from the cache")
        words.append(f"memory {self.rss_bytes / 1e9:.1f} GB")
        if self.gpus:
            used, total = (sum(sizes) / 1e9 for sizes in zip(*self.gpus, strict=True))
            words.append(f"GPU {used:.1f} of {total:.1f} GB")
        logger.info("%s", ", ".join(words))

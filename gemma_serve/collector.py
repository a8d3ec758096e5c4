"""What Prometheus reads when it asks: states and totals that their owners keep, and vLLM's own metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .admission import Admission
from .blocks import Blocks
from .cache import ResponseCache
from .drain import Drain
from .engine.base import Engine, EngineState
from .rate_limit import RateLimiter
from .stats import Stats

_REJECTIONS = (
    "requests_per_minute",
    "in_flight",
    "tokens_per_minute",
    "tokens_per_day",
    "queue_requests",
    "queue_tokens",
    "queue_wait",
)


class ServerCollector(Collector):
    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        drain: Drain,
        limiter: RateLimiter,
        blocks: Blocks,
        stats: Stats,
        cache: ResponseCache | None = None,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._drain = drain
        self._limiter = limiter
        self._blocks = blocks
        self._stats = stats
        self._cache = cache

    def describe(self) -> Iterable[Metric]:
        return ()  # or registering would collect

    def collect(self) -> Iterable[Metric]:
        status, report, stats = self._engine.status, self._engine.report(), self._stats
        memory = {"rss": stats.rss_bytes}
        if stats.gpus:
            memory["gpu"] = sum(gpu.used for gpu in stats.gpus)
        if report.kv_cache_use is not None and report.kv_cache_bytes is not None:
            memory["kv_cache"] = round(report.kv_cache_use * report.kv_cache_bytes)
        # From 0 on, or Prometheus would not see the first one, nor an alert that there was none.
        rejections = dict.fromkeys(_REJECTIONS, 0) | self._limiter.rejections | self._admission.rejections
        rejections["blocked"] = self._blocks.refused
        yield _gauge("memory_usage_bytes", "Memory in use: of all processes, GPUs, KV cache", "type", memory)
        yield _gauge(
            "cpu_usage_percent",
            "CPU use of the server's and the engine's processes; 100 is one core",
            value=stats.cpu_percent,
        )
        yield _gauge(
            "gemma_engine_state",
            "1 for the state that the engine is in",
            "state",
            {str(state): int(status.state is state) for state in EngineState},
        )
        yield _gauge("gemma_queue_length", "Requests that wait for a place", value=self._admission.waiting)
        yield _counter("gemma_limit_rejections", "Requests refused by a limit", "reason", rejections)
        yield _counter(
            "gemma_engine_restarts", "Starts of another engine after one died", value=status.restarts
        )
        yield _counter(
            "gemma_resumed_requests", "Requests that went on after the engine died", value=report.resumed
        )
        yield _counter(
            "gemma_engine_stalled_seconds",
            "Time in which the engine had work and finished no step",
            value=status.stalled_seconds,
        )
        yield _counter(
            "gemma_drained_requests",
            "Requests that ended after the server was told to",
            value=self._drain.drained,
        )
        if self._cache is not None:
            yield from _of_cache(self._cache)
        yield from REGISTRY.collect()  # vLLM's, and Python's own


def _of_cache(cache: ResponseCache) -> Iterable[Metric]:
    store = cache.store
    yield _counter(
        "gemma_cache_requests", "Requests by what the response cache did", "result", cache.outcomes
    )
    yield _counter(
        "gemma_cache_evictions", "Answers that had to make room before they expired", value=store.evictions
    )
    yield _gauge("gemma_cache_entries", "Answers in the response cache", value=store.entries)
    yield _gauge("gemma_cache_bytes", "Bytes of the answers in the response cache", value=store.size)


def _gauge(
    name: str, help: str, label: str = "", values: Mapping[str, float] | None = None, value: float = 0
) -> Metric:
    family = GaugeMetricFamily(name, help, labels=[label] if label else [])
    for labels, amount in _rows(values, value):
        family.add_metric(labels, amount)
    return family


def _counter(
    name: str, help: str, label: str = "", values: Mapping[str, float] | None = None, value: float = 0
) -> Metric:
    family = CounterMetricFamily(name, help, labels=[label] if label else [])
    for labels, amount in _rows(values, value):
        family.add_metric(labels, amount)
    return family


def _rows(values: Mapping[str, float] | None, value: float) -> list[tuple[list[str], float]]:
    return [([], value)] if values is None else [([name], amount) for name, amount in values.items()]

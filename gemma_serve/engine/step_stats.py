"""vLLM's metrics, counted without the locks and checks that `prometheus_client` has for every value.

vLLM counts some thirty values a step and one a token, all in the event loop's thread, which also renders them
for a scrape: a tenth of what a token costs here.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, ClassVar

import prometheus_client
from prometheus_client.values import MutexValue, ValueClass
from vllm.v1.metrics.loggers import PrometheusStatLogger


class _Counter(prometheus_client.Counter):
    _value: Any

    def inc(self, amount: float = 1, exemplar: Any = None) -> None:
        self._value._value += amount


class _Gauge(prometheus_client.Gauge):
    _value: Any

    def set(self, value: float) -> None:
        self._value._value = float(value)


class _Histogram(prometheus_client.Histogram):
    _buckets: list[Any]
    _sum: Any
    _upper_bounds: list[float]

    def observe(self, amount: float, exemplar: Any = None) -> None:
        self._sum._value += amount
        self._buckets[bisect_left(self._upper_bounds, amount)]._value += 1


class StepStats(PrometheusStatLogger):  # type: ignore[misc]
    """In place of vLLM's."""

    if ValueClass is MutexValue:  # else the values are in files, for several processes
        _counter_cls: ClassVar = _Counter
        _gauge_cls: ClassVar = _Gauge
        _histogram_cls: ClassVar = _Histogram

"""That vLLM's metrics, counted the short way, are what `prometheus_client` would have counted."""

from __future__ import annotations

import random

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from gemma_serve.engine.step_stats import StepStats

from .conftest import InProcess


def counted(counter: type, gauge: type, histogram: type) -> str:
    registry, values = CollectorRegistry(), random.Random(0)
    tokens = counter("tokens", "", ["engine"], registry=registry).labels("0")
    running = gauge("running", "", ["engine"], registry=registry).labels("0")
    times = histogram("times", "", ["engine"], buckets=[0.1, 0.5, 1, 5], registry=registry).labels("0")
    for amount in [0.1, 0.5, 5, 7, -1, *(values.uniform(0, 6) for _ in range(200))]:
        tokens.inc(abs(amount))
        running.set(amount)
        times.observe(amount)
    tokens.inc()
    return "\n".join(
        line for line in generate_latest(registry).decode().splitlines() if "_created" not in line
    )


def test_the_short_way_counts_the_same() -> None:
    ours = counted(StepStats._counter_cls, StepStats._gauge_cls, StepStats._histogram_cls)
    theirs = counted(prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    assert ours == theirs
    assert StepStats._histogram_cls is not prometheus_client.Histogram


@pytest.mark.parametrize("what", ["_counter_cls", "_gauge_cls", "_histogram_cls"])
def test_vllm_makes_its_metrics_of_these_classes(what: str) -> None:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    assert hasattr(PrometheusStatLogger, what)


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
async def test_nothing_else_counts(in_process: InProcess) -> None:
    """vLLM's other logger counts for lines that only its own server prints, and grows with what it counts."""
    llm = in_process.engine._llm
    assert llm is not None and llm.logger_manager is not None
    assert [type(each) for each in llm.logger_manager.stat_loggers] == [StepStats]

"""What Prometheus is told as things happen; `collector.py` has what is read when it asks.

Everything is observed once a request, at its end: nothing here is paid for by the token.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Outcome = Literal["ok", "error", "aborted", "refused", "timeout"]
"""How a generation ended; `aborted`: its client left, `timeout`: its time was up, `refused`: it was wrong."""

_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120)
_INTER_TOKEN_BUCKETS = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_QUEUE_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)

_REMEMBERED, _RECENT_SECONDS = 2048, 300.0
_PERCENTILES = (50, 95, 99)


CONNECTIONS = ("http", "websocket")


class Recent:
    """The values of the last 5 minutes, at most 2,048 of them."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    def add(self, value: float) -> None:
        self._values.append((time.monotonic(), value))

    def percentiles(self) -> dict[str, float | None]:
        """`p50`, `p95` and `p99`; None while there are no values."""
        since = time.monotonic() - _RECENT_SECONDS
        values = sorted(value for moment, value in self._values if moment >= since)
        last = len(values) - 1
        return {f"p{share}": values[round(last * share / 100)] if values else None for share in _PERCENTILES}


class Metrics:
    """The collectors, on a registry of their own unless one is given. No label takes a client's own words."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        self.http_requests = Counter(
            "http_requests_total",
            "HTTP requests answered; status 499 is a client that left",
            ["method", "endpoint", "status"],
            registry=registry,
        )
        self.http_seconds = Histogram(
            "http_request_duration_seconds",
            "Time from a request's head to the last byte of its answer",
            ["method", "endpoint"],
            registry=registry,
            buckets=_REQUEST_BUCKETS,
        )
        self.connections = Gauge(
            "active_connections_total",
            "HTTP requests and WebSockets being served",
            ["type"],
            registry=registry,
        )
        for kind in CONNECTIONS:
            self.connections.labels(kind)
        self.inferences = Counter(
            "model_inference_total", "Generations ended", ["model", "outcome"], registry=registry
        )
        self.inference_seconds = Histogram(
            "model_inference_duration_seconds",
            "Time of a generation in the engine, without the wait for a place there",
            ["model"],
            registry=registry,
            buckets=_REQUEST_BUCKETS,
        )
        self.queue_seconds = Histogram(
            "gemma_queue_wait_seconds",
            "Wait for a place in the engine",
            registry=registry,
            buckets=_QUEUE_BUCKETS,
        )
        self.first_token_seconds = Histogram(
            "gemma_time_to_first_token_seconds",
            "Time from a valid request to the first text of its streamed answer, the queue included",
            ["model"],
            registry=registry,
            buckets=_FIRST_TOKEN_BUCKETS,
        )
        self.inter_token_seconds = Histogram(
            "gemma_inter_token_latency_seconds",
            "Mean time between the tokens of a streamed answer, one observation an answer",
            ["model"],
            registry=registry,
            buckets=_INTER_TOKEN_BUCKETS,
        )
        self.prompt_tokens = Counter(
            "gemma_prompt_tokens_total", "Tokens of prompts", ["model", "key"], registry=registry
        )
        self.completion_tokens = Counter(
            "gemma_completion_tokens_total", "Tokens of answers", ["model", "key"], registry=registry
        )
        self.recent_first_token = Recent()
        self.recent_inter_token = Recent()

    def active_connections(self) -> dict[str, int]:
        """How many are being served, by their type."""
        (family,) = self.connections.collect()
        return {sample.labels["type"]: int(sample.value) for sample in family.samples}


class Inference:
    """The measures of one generation, from its request to its end."""

    __slots__ = (
        "_admitted",
        "_ended",
        "_key",
        "_metrics",
        "_model",
        "_started",
        "answers",
        "completion_tokens",
        "first_token",
        "outcome",
        "prompt_tokens",
    )

    def __init__(self, metrics: Metrics, model: str, key: str | None, answers: int = 1) -> None:
        self._metrics = metrics
        self._model = model
        self._key = key or ""
        self._started = time.perf_counter()
        self._admitted: float | None = None
        self._ended = False
        self.answers = answers
        self.first_token: float | None = None
        """When the first text came (`time.perf_counter()`), where the answer is streamed."""
        self.outcome: Outcome = "aborted"
        self.prompt_tokens = self.completion_tokens = 0

    def admitted(self) -> None:
        """The engine has a place for it."""
        self._admitted = time.perf_counter()
        self._metrics.queue_seconds.observe(self._admitted - self._started)

    def end(self) -> None:
        """Observe everything; a second call does nothing."""
        if self._ended or self._admitted is None:
            return
        self._ended = True
        metrics, model, now = self._metrics, self._model, time.perf_counter()
        metrics.inferences.labels(model, self.outcome).inc()
        if self.prompt_tokens:
            metrics.prompt_tokens.labels(model, self._key).inc(self.prompt_tokens)
        if self.completion_tokens:
            metrics.completion_tokens.labels(model, self._key).inc(self.completion_tokens)
        if self.outcome == "refused":
            return
        metrics.inference_seconds.labels(model).observe(now - self._admitted)
        if self.first_token is None:
            return
        wait = self.first_token - self._started
        metrics.first_token_seconds.labels(model).observe(wait)
        metrics.recent_first_token.add(wait)
        gaps = self.completion_tokens / self.answers - 1
        if self.outcome == "ok" and gaps > 0:
            mean = (now - self.first_token) / gaps
            metrics.inter_token_seconds.labels(model).observe(mean)
            metrics.recent_inter_token.add(mean)

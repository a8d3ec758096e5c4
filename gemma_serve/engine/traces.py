"""What the engine did for a request, as spans below the request's: vLLM's own, and one for each phase."""

from __future__ import annotations

import logging
import time

from opentelemetry.trace import get_tracer
from vllm.tracing import extract_trace_context
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.stats import IterationStats

logger = logging.getLogger(__name__)

_PHASES = ("schedule", "prefill", "decode")


def trace_requests(llm: AsyncLLM, url: str) -> None:
    """Have vLLM take `trace_headers` with requests, and make spans of those that have them.

    Its own argument for this would set up a sender for each model that is loaded; here spans go where
    `tracing.Tracing` sends those of this process.
    """
    if not llm.log_stats:
        logger.warning("Traces do not show what the engine does: engine.disable_log_stats is set")
        return
    llm.observability_config.otlp_traces_endpoint = url  # what it looks at before it takes them
    processor: OutputProcessor = llm.output_processor
    of_vllm = processor.do_tracing

    def trace(output: EngineCoreOutput, state: RequestState, stats: IterationStats | None) -> None:
        if output.trace_headers is None:
            return  # nobody's: a warm-up
        try:
            of_vllm(output, state, stats)
            _phases(output, state)
        except Exception:  # the output loop is everybody's
            logger.exception("The engine's part of a trace could not be made")

    processor.do_tracing = trace
    processor.tracing_enabled = True


def _phases(output: EngineCoreOutput, state: RequestState) -> None:
    """They end now: the engine's clock may be another machine's, so only its differences count."""
    stats = state.stats
    if stats is None or not stats.queued_ts <= stats.scheduled_ts <= stats.first_token_ts:
        return
    tracer, context = get_tracer("gemma_serve"), extract_trace_context(output.trace_headers)
    moments = (stats.queued_ts, stats.scheduled_ts, stats.first_token_ts, stats.last_token_ts)
    now = time.time_ns()
    times = [now - int((moments[-1] - moment) * 1e9) for moment in moments]
    for name, begun, ended in zip(_PHASES, times, times[1:], strict=False):
        tracer.start_span(name, context, start_time=begun).end(ended)

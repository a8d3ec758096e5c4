"""Tokens from vLLM's output loop straight to who writes them, without waking a task for each.

`AsyncLLM` makes three objects of a token, puts them into the request's queue and wakes the task that waits
there. A stream of plain text needs none of this: once it has begun, its `RequestState` is made to give the
text alone and its queue is replaced by a `DirectOutput`, which keeps the text. What a step has brought is
written after it, or, when this thread is busy, together with the next ones'.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from vllm import envs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestState
from vllm.v1.metrics.stats import IterationStats

from ..turns import Turns
from .base import Delta, Sink, Usage

T = TypeVar("T")

_AT_ONCE = 8  # streams written before others have their turn
_WINDOW_SECONDS = 0.1
_TURN_SECONDS = 0.002
_NO_WAIT_SECONDS = 0.00005  # the queue had the next step already
_SPARE, _FULL = 0.4, 0.8
"""Shares of the time: up to the first nothing is kept, from the second on for as long as is set."""


class Piece(NamedTuple):
    """What is kept of a step's output."""

    text: str
    tokens: int
    finish_reason: str | None
    stop_reason: int | str | None


class _DirectState(RequestState):  # type: ignore[misc]
    """Makes a `Piece` where vLLM makes a RequestOutput; for one answer, streamed, of text alone."""

    sent_tokens_offset: int

    def make_request_output(
        self,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: int | str | None,
        *args: Any,
        **kwargs: Any,
    ) -> Piece | None:
        finished, count = finish_reason is not None, len(new_token_ids)
        if self.stream_interval > 1:  # as in vLLM
            made = self.detokenizer.num_output_tokens()
            if not (finished or made - self.sent_tokens_offset >= self.stream_interval):
                return None
            count, self.sent_tokens_offset = made - self.sent_tokens_offset, made
        text = self.detokenizer.get_next_output_text(finished, True)
        return Piece(text, count, str(finish_reason) if finished else None, stop_reason)


class _TextState(_DirectState):
    """One whose every token is text that can go out: there is no stop string to wait for."""

    def take(self, text: str, tokens: int) -> None:
        if self.stream_interval == 1:
            self.queue.add(text, tokens)
            return
        detokenizer = self.detokenizer
        detokenizer.output_text += text  # behind what vLLM's own way has left there
        made = len(detokenizer.token_ids)
        if made - self.sent_tokens_offset >= self.stream_interval:
            self.queue.add(detokenizer.get_next_output_text(False, True), made - self.sent_tokens_offset)
            self.sent_tokens_offset = made


class _WholeState(RequestState):  # type: ignore[misc]
    """One that is answered whole, with text alone: until it ends there is nothing to make."""

    def take(self, text: str, tokens: int) -> None:
        self.detokenizer.output_text += text


class DirectProcessor(OutputProcessor):  # type: ignore[misc]
    """Takes the short way with a token of which there is nothing to know but its text."""

    def add_request(self, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        super().add_request(request, *args, **kwargs)
        state = self.request_states.get(request.request_id)
        if (
            type(state) is RequestState
            and state.output_kind is RequestOutputKind.FINAL_ONLY
            and _is_text(state)
            and not getattr(request, "resumable", False)
        ):
            state.__class__ = _WholeState

    def process_outputs(
        self,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        iteration_stats: IterationStats | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> OutputProcessorOutput:
        states, others, count = self.request_states, [], 0
        gaps = [] if iteration_stats is None else iteration_stats.inter_token_latencies_iter
        for output in engine_core_outputs:
            state = states.get(output.request_id)
            if (
                type(state) not in _SHORT
                or output.finish_reason is not None
                or output.events is not None  # it was preempted, or goes on in another core
                or state.is_prefilling
                or _has_more(output)
            ):
                others.append(output)
                continue
            tokens, detokenizer = output.new_token_ids, state.detokenizer
            detokenizer.token_ids += tokens
            # vLLM would look for stop strings, and make objects of each token.
            text = "".join(map(detokenizer.decode_next, tokens))
            if (stats := state.stats) is not None:
                stats.num_generation_tokens += len(tokens)
                gaps.append(engine_core_timestamp - stats.last_token_ts)
                stats.last_token_ts = engine_core_timestamp
            count += len(tokens)
            state.take(text, len(tokens))
        if iteration_stats is not None:
            iteration_stats.num_generation_tokens += count
        if not others:
            return OutputProcessorOutput(request_outputs=[], reqs_to_abort=[])
        return super().process_outputs(others, engine_core_timestamp, iteration_stats, *args, **kwargs)


_SHORT = {_TextState, _WholeState}


def _is_text(state: RequestState) -> bool:
    """Are its tokens nothing but text?"""
    detokenizer, logprobs = state.detokenizer, state.logprobs_processor
    return (
        type(detokenizer) is FastIncrementalDetokenizer
        and not detokenizer.stop
        and logprobs.num_logprobs is None
        and logprobs.num_prompt_logprobs is None
    )


def _has_more(output: EngineCoreOutput) -> bool:
    """What an engine gives only if it is set up for it, and vLLM 0.26 does not know."""
    return (
        output.num_nans_in_logits != 0
        or output.routed_experts is not None
        or getattr(output, "new_sampling_mask", None) is not None
    )


class DirectOutput:
    """Stands in for the `RequestOutputCollector` of a stream."""

    __slots__ = ("_dirty", "_error", "_flushes", "_sink", "_texts", "_usage", "_wake", "finish_reason")

    def __init__(self, sink: Sink, usage: Usage, flushes: Flushes) -> None:
        self._sink = sink
        self._usage = usage
        self._flushes = flushes
        self._texts: list[str] = []  # that the sink does not have yet
        self._dirty = False
        self._error: Exception | None = None
        self._wake = asyncio.Event()
        self.finish_reason: str | None = None

    def add(self, text: str, tokens: int) -> None:
        """Keep a text, which goes out with the next flush. It is empty for half a character."""
        if self._error is not None:  # what comes after a failure is no answer, as in vLLM's collector
            return
        self._usage.completion_tokens += tokens
        if text:
            self._texts.append(text)
            if not self._dirty:
                self._dirty = True
                self._flushes.add(self)

    def put(self, piece: Piece | Exception) -> None:
        if isinstance(piece, Exception):
            self._fail(piece)
            return
        text, tokens, reason, stop = piece
        if reason is None or self._error is not None:
            self.add(text, tokens)
            return
        self._usage.completion_tokens += tokens
        self._hand_over()
        if reason != "error":
            details = None if stop is None else {"stop_reason": stop}
            self._give(self._sink.put, Delta(0, text, reason, None, details))
        self.finish_reason = reason
        self._flushes.ends.take(self._wake.set)

    def flush(self) -> None:
        self._dirty = False
        self._hand_over()
        if self.finish_reason is None and not self._give(self._sink.flush):
            self._wake.set()

    def _hand_over(self) -> None:
        if self._texts:
            texts, self._texts = self._texts, []
            self._give(self._sink.put_texts, texts)

    def _give(self, call: Callable[..., T], *args: Any) -> T | None:
        """The output loop is everybody's: what fails is told to who waits in `run`."""
        try:
            return call(*args)
        except Exception as error:
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._wake.set()

    async def run(self) -> None:
        """Write what cannot be written at once, and the end. Raises what vLLM puts into its queues."""
        finished = False
        while not finished:
            await self._wake.wait()
            self._wake.clear()
            finished = self.finish_reason is not None
            self._hand_over()
            await self._sink.drain()
            if self._error is not None:
                raise self._error


class Flushes:
    """Which streams have something to write, and when they write it.

    At once while the output loop has time to spare. The less it waits for the engine, the longer tokens are
    kept, so that several go in one write, which is most of what a token costs.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        """Seconds for which a token is kept at most; 0 keeps none."""
        self.ends = Turns()
        """When streams end that end together."""
        self._keep = 0.0
        self._dirty: list[DirectOutput] = []
        self._due: deque[DirectOutput] = deque()
        self._since = self._measured = self._waits = self._turn = time.perf_counter()
        self._waited = 0.0
        self._shared = False
        self._chunk: int = envs.VLLM_V1_OUTPUT_PROC_CHUNK_SIZE
        self._timer: asyncio.TimerHandle | None = None

    def add(self, output: DirectOutput) -> None:
        if not self._dirty:
            self._since = time.perf_counter()
        self._dirty.append(output)

    def keep_others_waiting(self) -> bool:
        """Small steps that had queued up have been processed one after the other for as long as one may."""
        now = time.perf_counter()
        if over := now - self._turn > _TURN_SECONDS:
            self._turn = now
        return over and not self._shared

    def after_step(self) -> None:
        """All outputs of a step have been processed, and the loop waits for the next."""
        now = self._waits = time.perf_counter()
        if now - self._measured > _WINDOW_SECONDS:
            busy = 1 - self._waited / (now - self._measured)
            self._measured, self._waited = now, 0.0
            self._keep = self.longest * min(1.0, max(0.0, (busy - _SPARE) / (_FULL - _SPARE)))
        if not self._dirty:
            return
        left = self._since + self._keep - now
        if left <= 0:
            self.flush()
            self._waits = time.perf_counter()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(left, self.flush)

    def before_step(self, outputs: int) -> None:
        """The engine has sent the next, with so many outputs."""
        self._shared = outputs > self._chunk  # in such a step AsyncLLM itself lets others have their turn
        now = time.perf_counter()
        waited = now - self._waits
        self._waited += waited
        if waited > _NO_WAIT_SECONDS:
            self._turn = now

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        begun = bool(self._due)
        self._due += self._dirty
        self._dirty = []
        if not begun:
            self._flush_some()

    def _flush_some(self) -> None:
        """The rest after what else the loop has to do: a probe must not wait for hundreds of writes."""
        due, began = self._due, time.perf_counter()
        for _ in range(min(_AT_ONCE, len(due))):
            due.popleft().flush()
        self._waits += time.perf_counter() - began  # this is no waiting for the engine
        if due:
            asyncio.get_running_loop().call_soon(self._flush_some)


def tap(
    processor: OutputProcessor, flushes: Flushes, result: RequestOutput, sink: Sink, usage: Usage
) -> DirectOutput | None:
    """Lead what comes after `result` to `sink`; None where it must go on through vLLM's queue."""
    names = processor.external_req_ids.get(result.request_id, ())
    state = processor.request_states.get(names[0]) if len(names) == 1 else None
    if (
        state is None
        or type(state) is not RequestState
        or state.parent_req is not None
        or state.output_kind is not RequestOutputKind.DELTA
        or state.queue is None
        or state.queue.output is not None  # more has come already: ask again after that
    ):
        return None
    output = DirectOutput(sink, usage, flushes)
    state.__class__ = _TextState if _is_text(state) else _DirectState
    state.queue = output
    return output

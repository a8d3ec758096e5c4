"""How plain streams are written from the output loop; that they are, every stream of the live tests shows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState
from vllm.v1.metrics.stats import IterationStats

from gemma_serve import demo_model
from gemma_serve.engine import direct
from gemma_serve.engine.base import Delta, EngineState, EngineStatus, Usage
from gemma_serve.engine.direct import DirectOutput, DirectProcessor, Flushes, Piece, tap
from gemma_serve.engine.supervisor import Supervisor


def request_of(name: str, shared: str, params: SamplingParams) -> EngineCoreRequest:
    fields = dict.fromkeys(("mm_features", "pooling_params", "lora_request", "cache_salt"))
    return EngineCoreRequest(
        request_id=name,
        external_req_id=shared,
        prompt_token_ids=[1],
        sampling_params=params,
        arrival_time=0.0,
        data_parallel_rank=None,
        **fields,
    )


class Sink:
    """Keeps what is written; `open` says whether that needs no waiting."""

    def __init__(self) -> None:
        self.open = True
        self.kept: list[str] = []
        self.writes: list[str] = []

    def put(self, delta: Delta) -> None:
        if delta.text == "fail":
            raise ValueError("cannot be rendered")
        self.kept.append(delta.text)

    def put_texts(self, texts: list[str]) -> None:
        for text in texts:
            self.put(Delta(0, text))

    def flush(self) -> bool:
        if self.open:
            self._write()
        return self.open

    async def drain(self) -> None:
        await asyncio.sleep(0)
        self._write()

    def _write(self) -> None:
        if self.kept:
            self.writes.append("".join(self.kept))
            self.kept.clear()


def piece(text: str, reason: str | None = None) -> Piece:
    return Piece(text, 1, reason, None)


async def test_each_step_is_written_at_once_while_there_is_time() -> None:
    sink, usage, flushes = Sink(), Usage(), Flushes()
    output = DirectOutput(sink, usage, flushes)
    running = asyncio.create_task(output.run())
    for text in ("a", "b"):
        output.put(piece(text))
        flushes.after_step()
    assert sink.writes == ["a", "b"]
    output.put(piece("c", "stop"))
    await running
    assert sink.writes == ["a", "b", "c"]
    assert usage.completion_tokens == 3


async def test_tokens_are_kept_while_the_loop_is_busy_but_not_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(direct, "time", SimpleNamespace(perf_counter=lambda: now))
    sink, flushes = Sink(), Flushes()
    flushes.longest = 0.05
    output = DirectOutput(sink, Usage(), flushes)
    for _ in range(20):  # never waits for the engine
        flushes.after_step()
        flushes.before_step(1)
        now += 0.01
    for text in ("a", "b"):
        output.put(piece(text))
        flushes.after_step()
    assert sink.writes == []
    async with asyncio.timeout(5):
        while not sink.writes:
            await asyncio.sleep(0.001)
    assert sink.writes == ["ab"]


@pytest.mark.parametrize(("outputs", "shares"), [(1, True), (1000, False)])
def test_others_have_their_turn_between_small_steps_that_have_queued_up(outputs: int, shares: bool) -> None:
    flushes = Flushes()
    end = time.perf_counter() + 0.05
    turns = 0
    while time.perf_counter() < end:
        flushes.after_step()
        flushes.before_step(outputs)
        turns += flushes.keep_others_waiting()
    assert bool(turns) is shares
    flushes.after_step()
    time.sleep(0.005)  # the engine takes its time: others have had theirs
    flushes.before_step(outputs)
    assert not flushes.keep_others_waiting()


async def test_a_client_that_does_not_read_gets_it_later_and_in_order() -> None:
    sink, flushes = Sink(), Flushes()
    output = DirectOutput(sink, Usage(), flushes)
    running = asyncio.create_task(output.run())
    sink.open = False
    output.put(piece("a"))
    flushes.after_step()
    output.put(piece("b"))
    output.put(piece("", "length"))
    await running
    assert "".join(sink.writes) == "ab"


@pytest.mark.parametrize("fault", [piece("fail"), RuntimeError("the engine is gone")])
async def test_a_failure_is_this_streams_alone(fault: Piece | Exception) -> None:
    sink, flushes = Sink(), Flushes()
    output = DirectOutput(sink, Usage(), flushes)
    output.put(piece("a"))
    output.put(fault)
    flushes.after_step()
    with pytest.raises((ValueError, RuntimeError)):
        await output.run()
    assert sink.writes == ["a"]  # what came before is not lost


async def test_what_comes_after_a_failure_is_no_answer() -> None:
    """A request that ran again and said something else: more of that may be on its way."""
    sink, usage, flushes = Sink(), Usage(), Flushes()
    output = DirectOutput(sink, usage, flushes)
    for said in (piece("a"), RuntimeError("it cannot be continued"), piece(" wrong"), piece(".", "stop")):
        output.put(said)
        flushes.after_step()
    with pytest.raises(RuntimeError, match="continued"):
        await output.run()
    assert (sink.writes, usage.completion_tokens) == (["a"], 1)


async def test_other_work_is_done_between_the_writes_of_a_step() -> None:
    flushes = Flushes()
    sinks = [Sink() for _ in range(20)]
    for sink in sinks:
        DirectOutput(sink, Usage(), flushes).put(piece("a"))
    flushes.after_step()
    written = []
    for _ in range(3):
        written.append(sum(bool(sink.writes) for sink in sinks))
        await asyncio.sleep(0)
    assert written == [8, 16, 20]


@pytest.mark.parametrize("stop", [[], ["never"]])
@pytest.mark.parametrize("together", [1, 3])
async def test_the_short_way_gives_and_counts_what_vllm_does(stop: list[str], together: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model.PATH)
    text = "Two cats 🐈🐈 sat in the garden, naïve as ever.\n\n1. One\n2. Two <end_of_turn> and more."
    tokens = tokenizer.encode(text, add_special_tokens=False)
    steps = [tokens[start : start + together] for start in range(0, len(tokens), together)]

    def played(processor_class: type[OutputProcessor]) -> tuple[str, int, IterationStats]:
        processor = processor_class(tokenizer, log_stats=True)
        params = SamplingParams(max_tokens=999, stop=stop, output_kind=RequestOutputKind.DELTA)
        queue = RequestOutputCollector(params.output_kind, "one")
        processor.add_request(request_of("one", "one", params), None, None, 0, queue)
        stats, sink, usage = IterationStats(), Sink(), Usage()
        texts, direct = [], None
        for number, step in enumerate(steps):
            finish = FinishReason.LENGTH if number == len(steps) - 1 else None
            output = EngineCoreOutput("one", list(step), finish_reason=finish)
            processor.process_outputs([output], 100.0 + number, stats)
            if direct is not None:
                direct.flush()
            elif (result := queue.get_nowait()) is not None:
                texts.append(result.outputs[0].text)
                usage.completion_tokens += len(result.outputs[0].token_ids)
                if processor_class is DirectProcessor:
                    direct = tap(processor, Flushes(), result, sink, usage)
        assert (direct is None) == (processor_class is OutputProcessor) and not processor.request_states
        return "".join(texts + sink.writes + sink.kept), usage.completion_tokens, stats

    ours, theirs = played(DirectProcessor), played(OutputProcessor)
    assert ours[:2] == theirs[:2]
    assert ours[1] == len(tokens)
    for name in ("num_generation_tokens", "inter_token_latencies_iter", "max_num_generation_tokens_iter"):
        assert getattr(ours[2], name) == getattr(theirs[2], name)
    assert [one.num_generation_tokens for one in ours[2].finished_requests] == [len(tokens)]


async def test_a_whole_answer_that_takes_the_short_way_is_vllms() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model.PATH)
    tokens = tokenizer.encode("Two cats 🐈🐈 sat in the garden, naïve.", add_special_tokens=False)
    params = SamplingParams(max_tokens=999, output_kind=RequestOutputKind.FINAL_ONLY)

    def played(processor_class: type[OutputProcessor]) -> tuple[Any, IterationStats]:
        processor = processor_class(tokenizer, log_stats=True)
        queue = RequestOutputCollector(params.output_kind, "one")
        processor.add_request(request_of("one", "one", params), None, None, 0, queue)
        stats = IterationStats()
        for number, token in enumerate(tokens):
            finish = FinishReason.LENGTH if number == len(tokens) - 1 else None
            output = EngineCoreOutput("one", [token], finish_reason=finish)
            processor.process_outputs([output], 100.0 + number, stats)
            assert queue.output is None or finish
        result = queue.get_nowait()
        assert isinstance(result, RequestOutput) and result.finished and not processor.request_states
        return result.outputs[0], stats

    (ours, our_stats), (theirs, their_stats) = played(DirectProcessor), played(OutputProcessor)
    assert ours.text == theirs.text and ours.token_ids == theirs.token_ids == tokens
    assert ours.finish_reason == theirs.finish_reason == "length"
    assert our_stats.num_generation_tokens == their_stats.num_generation_tokens == len(tokens)
    assert our_stats.inter_token_latencies_iter == their_stats.inter_token_latencies_iter
    assert our_stats.finished_requests[0].num_generation_tokens == len(tokens)


@pytest.mark.parametrize(
    ("params", "short"),
    [({}, True), ({"stop": ["never"]}, False), ({"logprobs": 1}, False), ({"detokenize": False}, False)],
)
def test_who_takes_the_short_way(params: dict[str, Any], short: bool) -> None:
    processor = DirectProcessor(AutoTokenizer.from_pretrained(demo_model.PATH), log_stats=False)
    given = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **params)
    processor.add_request(request_of("one", "one", given), None, None, 0, None)
    assert (type(processor.request_states["one"]) is not RequestState) is short


@pytest.mark.parametrize("late", [0, 1, 2, 6])
@pytest.mark.parametrize("events_at", [None, 5, 7, 8])
async def test_chunks_of_an_interval_are_vllms(late: int, events_at: int | None) -> None:
    """Also where the short way begins or is left in the middle of one."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model.PATH)
    tokens = tokenizer.encode("Two cats 🐈🐈 sat in the garden, naïve as ever.", add_special_tokens=False)

    def played(processor_class: type[OutputProcessor]) -> list[str]:
        processor = processor_class(tokenizer, log_stats=False, stream_interval=4)
        params = SamplingParams(max_tokens=999, output_kind=RequestOutputKind.DELTA)
        queue = RequestOutputCollector(params.output_kind, "one")
        processor.add_request(request_of("one", "one", params), None, None, 0, queue)
        texts, sink, usage = list[str](), Sink(), Usage()
        direct: DirectOutput | None = None
        for number, token in enumerate(tokens):
            finish = FinishReason.LENGTH if number == len(tokens) - 1 else None
            events = (
                [EngineCoreEvent.new_event(EngineCoreEventType.PREEMPTED)] if number == events_at else None
            )
            output = EngineCoreOutput("one", [token], finish_reason=finish, events=events)
            processor.process_outputs([output])
            if direct is not None:
                direct.flush()
                continue
            if (result := queue.get_nowait()) is not None:
                assert isinstance(result, RequestOutput)
                texts.append(result.outputs[0].text)
                usage.completion_tokens += len(result.outputs[0].token_ids)
                last = result
            if processor_class is DirectProcessor and number >= late:
                direct = tap(processor, Flushes(), last, sink, usage)
        assert (direct is not None) == (processor_class is DirectProcessor)
        assert direct is None or usage.completion_tokens == len(tokens)
        return texts + sink.writes + sink.kept

    assert played(DirectProcessor) == played(OutputProcessor)


class Engine:
    """AsyncLLM's part in a generation, with vLLM's real output processor."""

    def __init__(self) -> None:
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.engine_core = SimpleNamespace(flushes=Flushes())

    async def generate(self, name: str, params: SamplingParams, shared: str) -> AsyncIterator[Any]:
        request = request_of(name, shared, params)
        queue = RequestOutputCollector(params.output_kind, name)
        self.output_processor.add_request(request, None, None, 0, queue)
        while True:
            yield await queue.get()

    def step(self, name: str, token: int, finish: FinishReason | None = None) -> None:
        self.output_processor.process_outputs([EngineCoreOutput(name, [token], finish_reason=finish)])


async def test_who_shares_an_id_does_not_get_the_others_tokens() -> None:
    """A client chooses its requests' ids, also one whose requests all have the same."""
    engine, status = Engine(), EngineStatus()
    status.set(EngineState.READY)
    supervisor = Supervisor(engine, status)
    params = SamplingParams(max_tokens=9, detokenize=False, output_kind=RequestOutputKind.DELTA)
    first, second = (supervisor.generate(name, params, "shared") for name in ("first", "second"))

    coming = {outputs: asyncio.ensure_future(anext(outputs)) for outputs in (first, second)}
    await asyncio.sleep(0)  # both are under way

    async def tapped(outputs: Any, *step: Any) -> DirectOutput | None:
        """What becomes of what comes after this step's output."""
        engine.step(*step)
        async with asyncio.timeout(5):
            output: RequestOutput = await coming[outputs]
        direct = supervisor.tap(output, Sink(), Usage())
        coming[outputs] = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0)
        return direct

    async def leave(outputs: Any) -> None:
        coming[outputs].cancel()
        await asyncio.wait([coming[outputs]])

    assert await tapped(second, "second", 5) is None
    assert await tapped(first, "first", 6) is None
    assert await tapped(first, "first", 7, FinishReason.STOP) is None  # now vLLM knows one of that name
    await leave(first)
    assert await tapped(second, "second", 8) is not None
    await leave(second)

"""The core's replacement, step by step: vLLM's real output processor above, a core by hand below."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from gemma_serve.engine.core import ReplaceableCore
from gemma_serve.errors import EngineCrash, EngineDied, ServeError

from .conftest import until


class HandCore:
    """What the test says, the engine does."""

    def __init__(self, exitcode: int = 1) -> None:
        process = SimpleNamespace(exitcode=exitcode)
        manager = SimpleNamespace(processes=[process])
        self.resources = SimpleNamespace(engine_dead=False, engine_manager=manager)
        self.utility_results: dict[int, asyncio.Future[Any]] = {}
        self.added: list[EngineCoreRequest] = []
        self.aborted: list[str] = []
        self._outputs: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        if self.resources.engine_dead:
            raise EngineDeadError()
        self.added.append(request)

    async def abort_requests_async(self, names: list[str]) -> None:
        self.aborted += names

    async def get_output_async(self) -> EngineCoreOutputs:
        outputs = await self._outputs.get()
        if isinstance(outputs, Exception):
            raise outputs
        return outputs

    def give(self, name: str, *tokens: int, finish: FinishReason | None = None) -> None:
        self._outputs.put_nowait(
            EngineCoreOutputs(outputs=[EngineCoreOutput(name, list(tokens), finish_reason=finish)])
        )

    def die(self) -> None:
        self.resources.engine_dead = True
        self._outputs.put_nowait(EngineDeadError())

    @property
    def names(self) -> list[str]:
        return [request.request_id for request in self.added]


class Bench:
    """AsyncLLM's part: it feeds the processor, and hands requests to the core."""

    def __init__(self) -> None:
        self.hand = HandCore()
        self.deaths = 0
        self.processor = OutputProcessor(None, log_stats=False)
        self.core = ReplaceableCore(self.hand, self.processor, self._on_death)
        self.queues: dict[str, RequestOutputCollector] = {}
        self._loop = asyncio.create_task(self._output_handler())

    def _on_death(self) -> None:
        self.deaths += 1

    async def _output_handler(self) -> None:
        try:
            while True:
                outputs = await self.core.get_output_async()
                self.processor.process_outputs(outputs.outputs)
        except EngineDeadError as error:
            self.processor.propagate_error(error)

    async def add(self, name: str, prompt: int = 0, **params: Any) -> None:
        kind = RequestOutputKind.DELTA
        request = EngineCoreRequest(
            request_id=name,
            external_req_id=name,
            prompt_token_ids=[1, prompt],
            mm_features=None,
            sampling_params=SamplingParams(
                **{"max_tokens": 50, "detokenize": False, "temperature": 0.0, "output_kind": kind, **params}
            ),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.queues[name] = RequestOutputCollector(kind, name)
        self.processor.add_request(request, None, None, 0, self.queues[name])
        await self.core.add_request_async(request)

    async def abort(self, name: str) -> None:
        self.processor.abort_requests([name], internal=True)
        await self.core.abort_requests_async([name])

    async def tokens(self, name: str, count: int) -> list[int]:
        """The next `count` tokens that the client gets."""
        got: list[int] = []
        async with asyncio.timeout(5):
            while len(got) < count:
                output = await self.queues[name].get()
                assert isinstance(output, RequestOutput)
                got += output.outputs[0].token_ids
        return got

    async def died(self) -> None:
        before = self.deaths
        self.hand.die()
        await until(lambda: self.deaths == before + 1)
        self.core.died()

    def replace(self, exitcode: int = 1) -> HandCore:
        self.hand = HandCore(exitcode)
        self.back = asyncio.create_task(self.core.replace(self.hand))
        return self.hand

    def close(self) -> None:
        self._loop.cancel()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


async def test_tokens_go_on_where_they_were(bench: Bench) -> None:
    await bench.add("a")
    bench.hand.give("a", 5)
    bench.hand.give("a", 6)
    assert await bench.tokens("a", 2) == [5, 6]
    bench.hand.resources.engine_manager.processes[0].exitcode = -9
    await bench.died()
    await bench.add("b")  # while there is no engine
    hand = bench.replace()
    await until(lambda: hand.names == ["a", "b"])
    assert hand.added[0].prompt_token_ids == [1, 0, 5, 6]
    assert hand.added[0].sampling_params is not None
    assert hand.added[0].sampling_params.max_tokens == 48
    hand.give("a", 7, finish=FinishReason.LENGTH)
    assert await bench.tokens("a", 1) == [7]
    assert list(bench.processor.request_states) == ["b"]
    assert bench.core.resumed_total == 2


async def test_a_replay_shows_nothing_twice(bench: Bench) -> None:
    await bench.add("a", seed=3, temperature=1.0)
    bench.hand.give("a", 5, 6)
    assert await bench.tokens("a", 2) == [5, 6]
    bench.hand.resources.engine_manager.processes[0].exitcode = -9
    await bench.died()
    hand = bench.replace()
    await until(lambda: hand.names == ["a"])
    assert hand.added[0].prompt_token_ids == [1, 0]
    hand.give("a", 5)
    hand.give("a", 6, 7)
    assert await bench.tokens("a", 1) == [7]
    await bench.died()
    hand = bench.replace()
    await until(lambda: hand.names == ["a"])
    hand.give("a", 5)
    hand.give("a", 9)  # not what the client has
    with pytest.raises(EngineDied):
        await bench.tokens("a", 1)


async def test_suspects_are_tried_one_at_a_time_before_the_rest(bench: Bench) -> None:
    for name in "abc":
        await bench.add(name)
    await bench.died()  # by a failure of its own: all three were in their prefill
    await bench.add("d")
    hand = bench.replace()
    await until(lambda: hand.names == ["a"])
    hand.give("a", 5, 5, 5)
    hand.give("a", 5)
    await until(lambda: hand.names == ["a", "b"])
    assert not bench.back.done()
    await bench.abort("b")  # its client leaves during its trial
    await until(lambda: hand.names == ["a", "b", "c"])
    hand.give("c", 5, finish=FinishReason.STOP)
    await until(lambda: hand.names == ["a", "b", "c", "d"])
    assert await bench.back


async def test_the_guilty_one_is_refused_and_the_others_go_on(bench: Bench) -> None:
    await bench.add("innocent")
    await bench.add("poison", prompt=666)
    await bench.died()
    hand = bench.replace()
    await until(lambda: hand.names == ["innocent"])
    hand.give("innocent", 5, 6)
    hand.give("innocent", 7, 8)
    await until(lambda: hand.names == ["innocent", "poison"])
    await bench.died()
    with pytest.raises(EngineCrash):
        await bench.tokens("poison", 1)
    await bench.abort("poison")
    hand = bench.replace()
    await until(lambda: hand.names == ["innocent"])
    assert await bench.tokens("innocent", 4) == [5, 6, 7, 8]
    with pytest.raises(EngineCrash):
        await bench.add("again", prompt=666)
    assert list(bench.processor.request_states) == ["innocent"]


async def test_a_death_while_requests_come_back_loses_none(bench: Bench) -> None:
    for name in "abcd":
        await bench.add(name)
        bench.hand.give(name, 5, 6)
        assert await bench.tokens(name, 2) == [5, 6]
    bench.hand.resources.engine_manager.processes[0].exitcode = -9  # killed, thrice: that convicts nobody
    await bench.died()
    bench.replace(-9)
    await until(lambda: len(bench.hand.names) == 4)
    await bench.died()
    bench.replace(-9)
    await until(lambda: len(bench.hand.names) == 1)  # the others wait while it is tried
    await bench.died()
    hand = bench.replace()
    for name in "abcd":
        await until(lambda: name in hand.names)  # noqa: B023
        hand.give(name, 7, 8, 9, 10)
        assert await bench.tokens(name, 4) == [7, 8, 9, 10]


async def test_one_that_cannot_be_added_does_not_hold_up_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        await bench.add(name)
    bench.hand.resources.engine_manager.processes[0].exitcode = -9
    await bench.died()

    async def refuse_a(self: HandCore, request: EngineCoreRequest) -> None:
        if request.request_id == "a":
            raise ServeError("not this one")
        self.added.append(request)

    monkeypatch.setattr(HandCore, "add_request_async", refuse_a)
    hand = bench.replace()
    await until(lambda: hand.names == ["b"])
    with pytest.raises(ServeError, match="not this one"):
        await bench.tokens("a", 1)


async def test_a_core_that_dies_before_anybody_goes_on_leaves_the_loop_free(bench: Bench) -> None:
    await bench.add("a")
    bench.hand.resources.engine_manager.processes[0].exitcode = -9
    await bench.died()
    hand = HandCore()
    hand.resources.engine_dead = True  # said by vLLM's monitor, a thread, before the loop has heard of it
    going_on = asyncio.create_task(bench.core.replace(hand))
    await asyncio.sleep(0.05)
    assert not going_on.done()
    bench.hand = hand
    bench.core.notice_death()
    async with asyncio.timeout(5):
        assert not await going_on
    hand = bench.replace()
    await until(lambda: hand.names == ["a"])


async def test_who_asked_a_core_that_has_died_is_told(bench: Bench) -> None:
    asked = bench.hand.utility_results[1] = asyncio.get_running_loop().create_future()
    await bench.died()
    with pytest.raises(EngineDeadError):
        await asked


async def test_what_worked_alone_when_workers_were_killed_is_not_poison(bench: Bench) -> None:
    """Of a killed worker vLLM's engine dies too, by a failure of its own."""
    await bench.add("a")
    for _ in range(2):
        before = bench.deaths
        bench.hand.die()
        await until(lambda: bench.deaths > before)  # noqa: B023
        bench.core.died(killed=True)
        hand = bench.replace()
        await until(lambda: hand.names == ["a"])  # noqa: B023
        hand.give("a", 7)
        assert await bench.tokens("a", 1) == [7]


async def test_giving_up_fails_everyone(bench: Bench) -> None:
    await bench.add("a")
    await bench.died()
    await bench.add("b")
    bench.core.give_up()
    for name in "ab":
        with pytest.raises(EngineDeadError):
            await bench.tokens(name, 1)
    with pytest.raises(EngineDeadError):
        await bench.add("c")


async def test_poison_deep_in_a_request_that_runs_again_is_found(bench: Bench) -> None:
    """Its trial lasts until it is past the point of the death; who passed before is not blamed."""
    seeded: dict[str, Any] = {"temperature": 1.0, "seed": 1}
    await bench.add("innocent", **seeded)
    await bench.add("poison", prompt=666, **seeded)
    for name in ("innocent", "poison"):
        bench.hand.give(name, *range(10))
        await bench.tokens(name, 10)
    await bench.died()
    hand = bench.replace()
    await until(lambda: hand.names == ["innocent"])
    hand.give("innocent", *range(10))
    hand.give("innocent", 10, 11, 12, 13)
    assert await bench.tokens("innocent", 4) == [10, 11, 12, 13]
    await until(lambda: hand.names == ["innocent", "poison"])
    hand.give("poison", *range(10))
    await asyncio.sleep(0.02)
    await bench.died()  # at its eleventh token
    with pytest.raises(EngineCrash):
        await bench.tokens("poison", 1)


async def test_a_death_is_noticed_without_requests_and_only_once(bench: Bench) -> None:
    bench.hand.resources.engine_dead = True
    bench.core.notice_death()
    bench.core.notice_death()
    bench.hand.die()
    await asyncio.sleep(0.02)
    assert bench.deaths == 1


async def test_idleness_is_no_silence(bench: Bench) -> None:
    bench.core._last_step = time.monotonic() - 1000
    assert bench.core.silent_seconds() < 1
    await bench.add("a")
    assert bench.core.silent_seconds() < 1
    bench.core._last_step = time.monotonic() - 1000
    assert bench.core.silent_seconds() > 999
    bench.hand.give("a", 5)
    await bench.tokens("a", 1)
    assert bench.core.silent_seconds() < 1


async def test_what_has_ended_is_forgotten(bench: Bench) -> None:
    for number in range(500):
        await bench.add(f"r{number}")
        bench.hand.give(f"r{number}", 5, finish=FinishReason.STOP)
        await bench.tokens(f"r{number}", 1)
    bench.core.notice_death()
    assert not bench.core._entries


async def test_what_is_abandoned_ends_with_the_reason(bench: Bench) -> None:
    for name in ("a", "b"):
        await bench.add(name)
    bench.hand.give("a", 7)
    assert await bench.tokens("a", 1) == [7]
    bench.core.abandon(EngineDied("another model takes its place"))
    for name in ("a", "b"):
        async with asyncio.timeout(5):
            with pytest.raises(EngineDied, match="another model"):
                await bench.queues[name].get()
        await bench.abort(name)
    assert bench.core.unfinished == 0
    await bench.add("c")  # the core itself still works
    bench.hand.give("c", 9)
    assert await bench.tokens("c", 1) == [9]

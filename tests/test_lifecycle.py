"""The life of vLLM's engine as `VLLMEngine` leads it, where no real one is needed."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from gemma_serve.engine import restarts, vllm_engine
from gemma_serve.engine.base import EngineState
from gemma_serve.engine.lifecycle import VLLMEngine
from gemma_serve.engine.process_output import EngineOutput
from gemma_serve.engine.restarts import Restarts
from gemma_serve.errors import Conflict, EngineDied, ServeError
from gemma_serve.settings import Settings, SupervisorSettings


class Sleeper:
    """What `AsyncLLM` has for it, on a GPU."""

    model_config = SimpleNamespace(enable_sleep_mode=True)

    async def sleep(self, level: int) -> None:
        pass

    async def wake_up(self, tags: list[str] | None = None) -> None:
        pass


async def test_who_slept_after_requests_were_abandoned_takes_requests_again() -> None:
    engine = VLLMEngine(Settings(model={"name": "gemma-demo"}))
    engine._llm = Sleeper()
    engine.status.set(EngineState.READY)
    engine.abandon(ServeError("too late"))
    assert not engine.status.serving
    await engine.sleep(1)
    await engine.wake()
    assert engine.status.ready


async def test_an_engine_that_dies_asleep_is_started_when_it_is_woken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    restarted = []

    async def restart(engine: VLLMEngine) -> None:
        restarted.append(engine.status.state)

    monkeypatch.setattr(VLLMEngine, "_restart", restart)
    engine = VLLMEngine(Settings(model={"name": "gemma-demo"}))
    engine._llm, engine._serving = Sleeper(), object()  # type: ignore[assignment]
    engine.status.set(EngineState.READY)
    await engine.sleep(1)
    engine._on_death()
    await asyncio.sleep(0)
    assert not restarted
    await engine.wake()
    assert restarted == [EngineState.READY]


async def test_an_engine_that_is_started_again_does_not_sleep() -> None:
    engine = VLLMEngine(Settings(model={"name": "gemma-demo"}))
    engine._llm = Sleeper()
    engine.status.set(EngineState.RESTARTING)
    with pytest.raises(Conflict, match="restarting"):
        engine.require_sleep()


@pytest.mark.parametrize("doing", ["sleep", "wake"])
async def test_an_engine_that_dies_on_its_way_to_sleep_or_back_is_started_again(
    doing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    restarted = asyncio.Event()

    async def restart(engine: VLLMEngine) -> None:
        restarted.set()

    monkeypatch.setattr(VLLMEngine, "_restart", restart)
    engine = VLLMEngine(Settings(model={"name": "gemma-demo"}))

    class Mortal(Sleeper):
        async def sleep(self, level: int) -> None:
            if doing == "sleep":
                self.die()

        async def wake_up(self, tags: list[str] | None = None) -> None:
            self.die()

        def die(self) -> None:
            engine._on_death()
            raise EngineDeadError(suppress_context=True)

    engine._llm, engine._serving = Mortal(), object()  # type: ignore[assignment]
    engine.status.set(EngineState.READY)
    if doing == "wake":
        await engine.sleep(1)
    with pytest.raises(EngineDied):
        await (engine.sleep(1) if doing == "sleep" else engine.wake())
    async with asyncio.timeout(5):
        await restarted.wait()


async def test_an_engine_that_cannot_sleep_is_not_taken_for_a_dead_one() -> None:
    """vLLM has paused it by then, so that it must not go on."""
    engine = VLLMEngine(Settings(model={"name": "gemma-demo"}))

    class Broken(Sleeper):
        async def sleep(self, level: int) -> None:
            raise Exception("Call to sleep method failed: out of memory")

    engine._llm = Broken()
    engine.status.set(EngineState.READY)
    with pytest.raises(Exception, match="sleep method failed") as failed:
        await engine.sleep(1)
    assert not isinstance(failed.value, ServeError)


def test_starts_in_vain_are_counted_however_long_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(restarts, "time", SimpleNamespace(monotonic=lambda: now))
    slow = Restarts(SupervisorSettings(max_restarts=3, restart_window_seconds=600))
    for _ in range(3):
        assert slow.next_wait() is not None
        now += 500
    assert slow.next_wait() is None
    assert "3 times in vain" in slow.spent()
    slow.succeeded()
    assert slow.next_wait() is not None


VLLMS_WORDS = (
    "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': %d}"
)


@pytest.mark.parametrize(
    ("error", "said", "sentence"),
    [
        (RuntimeError(VLLMS_WORDS % -9), "", "EngineCore was ended by SIGKILL"),
        (RuntimeError(VLLMS_WORDS % 1), "", "ended without a word"),
        (RuntimeError(VLLMS_WORDS % 1), "ERROR [EngineCore] ValueError: no such dtype\n", "no such dtype"),
    ],
)
async def test_why_a_load_failed(error: Exception, said: str, sentence: str) -> None:
    reader, writer = os.pipe()
    os.write(writer, said.encode())
    os.close(writer)
    output = EngineOutput(os.open(os.devnull, os.O_WRONLY))
    output.forward(reader)
    engine = VLLMEngine(Settings(model={"name": "gemma-demo"}))
    assert sentence in await engine._reason(error, output)


class MortalCore:
    """What `ReplaceableCore` needs of vLLM's client of an engine process."""

    def __init__(self) -> None:
        self.resources = SimpleNamespace(engine_dead=False, engine_manager=None)
        self.utility_results: dict[int, asyncio.Future[Any]] = {}
        self.dead = asyncio.Event()

    async def get_output_async(self) -> Any:
        await self.dead.wait()
        raise EngineDeadError(suppress_context=True)


async def test_an_engine_that_dies_while_it_warms_up_has_failed_to_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, mortal = VLLMEngine(Settings(model={"name": "gemma-demo"})), MortalCore()
    states: list[EngineState] = []
    engine.status.on_change = lambda status: states.append(status.state)
    processor = SimpleNamespace(request_states={})
    llm: Any = SimpleNamespace(engine_core=mortal, output_processor=processor, output_handler=None)

    async def serve(*args: Any) -> Any:
        mortal.resources.engine_dead = True
        mortal.dead.set()
        with pytest.raises(EngineDeadError):  # as its warm-up requests, whose failure alone is no reason
            await llm.engine_core.get_output_async()
        return SimpleNamespace(describe=lambda settings: None)

    def load() -> Any:
        engine._llm = llm
        return llm

    monkeypatch.setattr(engine, "_prepare", lambda: None)
    monkeypatch.setattr(engine, "_load", load)
    monkeypatch.setattr(vllm_engine, "serve", serve)
    await engine.start()
    async with asyncio.timeout(20):
        while not engine.status.failed:
            await asyncio.sleep(0.01)
    assert set(states) == {EngineState.LOADING, EngineState.FAILED}
    assert engine.status.error is not None and "while it warmed up" in engine.status.error

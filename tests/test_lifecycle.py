"""The life of vLLM's engine as `VLLMEngine` leads it, where no real one is needed."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from gemma_serve.engine import vllm_engine
from gemma_serve.engine.base import EngineState
from gemma_serve.engine.lifecycle import VLLMEngine
from gemma_serve.errors import ServeError
from gemma_serve.settings import Settings


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


class MortalCore:
    """What `ReplaceableCore` needs of vLLM's client of an engine process."""

    def __init__(self) -> None:
        self.resources = SimpleNamespace(engine_dead=False, engine_manager=None)
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

    monkeypatch.setattr(engine, "_load", load)
    monkeypatch.setattr(vllm_engine, "serve", serve)
    await engine.start()
    async with asyncio.timeout(20):
        while not engine.status.failed:
            await asyncio.sleep(0.01)
    assert set(states) == {EngineState.LOADING, EngineState.FAILED}
    assert engine.status.error is not None and "while it warmed up" in engine.status.error

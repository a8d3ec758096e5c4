"""The life of vLLM's engine as `VLLMEngine` leads it, where no real one is needed."""

from __future__ import annotations

from types import SimpleNamespace

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

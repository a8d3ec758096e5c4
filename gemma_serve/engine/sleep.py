"""An engine's sleep: vLLM's levels, and what happens when it dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import Conflict, EngineDied, NotImplementedHere
from .base import EngineState, EngineStatus

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

ANSWER_SECONDS = 600  # for vLLM's processes: asked when they have died, they never answer


class Sleep:
    """`restart` starts another engine; `background` has that done while others go on."""

    def __init__(
        self,
        status: EngineStatus,
        restart: Callable[[], Coroutine[Any, Any, None]],
        background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._status = status
        self._restart = restart
        self._background = background
        self._asleep = self._died = self._weights_dropped = False

    def died(self) -> bool:
        """The engine has. True where another one waits for `wake`: it would take what was to be free."""
        self._died = self._asleep
        return self._asleep

    def require(self, llm: AsyncLLM | None) -> None:
        """Raise `ServeError` unless `llm` can sleep now."""
        if llm is None or not llm.model_config.enable_sleep_mode:
            raise NotImplementedHere(
                "This model cannot sleep: it was loaded without engine.enable_sleep_mode, which needs a GPU. "
                "Unload it instead."
            )
        if self._status.state not in (EngineState.READY, EngineState.UNLOADED):  # the latter by `abandon`
            raise Conflict(f"The engine is {self._status.state}: try again when it is ready.")

    async def begin(self, llm: AsyncLLM, level: int) -> None:
        self._weights_dropped, self._asleep = level > 1, True
        with self._told_when_it_dies("went to sleep"):
            async with asyncio.timeout(ANSWER_SECONDS):
                await llm.sleep(level)

    async def end(self, llm: AsyncLLM) -> None:
        self._asleep = False
        if self._died:
            self._died = False
            await self._restart()
            return
        with self._told_when_it_dies("woke up"):
            async with asyncio.timeout(ANSWER_SECONDS):
                if self._weights_dropped:
                    await llm.wake_up(["weights"])
                    await llm.collective_rpc("reload_weights")
                    await llm.wake_up(["kv_cache"])
                else:
                    await llm.wake_up()
        if self._status.state is EngineState.UNLOADED:  # by `abandon`
            self._status.set(EngineState.READY)

    @contextlib.contextmanager
    def _told_when_it_dies(self, doing: str) -> Iterator[None]:
        """Raises `EngineDied`, and another engine is started. What else fails is no `ServeError`."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            self._asleep = False
            if self._died:
                self._died = False
                self._background(self._restart())
            raise EngineDied(f"The engine died while it {doing}; another one is started.") from error

"""The engine core under `AsyncLLM`, which can be replaced while requests wait.

`AsyncLLM` hands every request to an engine core in another process and gets tokens back. When that process
dies, vLLM ends. Here `AsyncLLM` talks to a `ReplaceableCore`, which keeps each request until it has ended:
a death is only a pause in its outputs, and the next core is given what the last one left undone. As this
lies below vLLM's request handling, it holds for every route, costs nothing per token, and keeps all that
`AsyncLLM` knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.stats import SchedulerStats

from ..errors import EngineCrash, EngineDied
from .quarantine import CRASHED, KILLED, Quarantine
from .resume import Diverged, Replay, Way, continued, restart, tokens_so_far, way_of

logger = logging.getLogger(__name__)

_TRIAL_TOKENS = 4  # past the point of the last death; the engine is some steps ahead of what we have from it
_TRIALS = 32  # suspects beyond that are tried several at a time


class _Entry:
    """A request that has not ended."""

    __slots__ = ("done_before", "replay", "request", "sent", "to_do")

    def __init__(self, request: EngineCoreRequest) -> None:
        self.request = request
        self.sent = False
        """Does the core that runs now have it?"""
        self.done_before = 0
        """How many of its tokens another core has made."""
        self.to_do = _TRIAL_TOKENS
        """How many tokens this core makes before it is past the point at which the last one died."""
        self.replay: Replay | None = None


class _Trial:
    """Requests that show, before others join them, that the engine survives them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self.passed = asyncio.Event()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def leave(self, name: str) -> None:
        self._names.discard(name)
        if not self._names:
            self.passed.set()


class ReplaceableCore:
    """Stands in for vLLM's `AsyncMPClient`; what it does not change goes to the core that runs now.

    `on_death` is called once for each core that dies, in the event loop; then `replace` or `give_up` is due.
    """

    def __init__(self, core: AsyncMPClient, processor: OutputProcessor, on_death: Callable[[], None]) -> None:
        self.resources = SimpleNamespace(engine_dead=False)  # what AsyncLLM asks before it takes a request
        self._core = core
        self._dead: AsyncMPClient | None = None
        self._processor = processor
        self._on_death = on_death
        self._entries: dict[str, _Entry] = {}
        self._quarantine = Quarantine()
        self._open = asyncio.Event()  # set while the core takes requests
        self._open.set()
        self._changed = asyncio.Event()  # set by each core that comes, and by giving up
        self._readmission: asyncio.Task[None] | None = None
        self._trial: _Trial | None = None
        self._replays = 0
        self._last_step = time.monotonic()
        self.resumed_total = 0
        """Requests that went on after a death, since the start."""
        self.scheduler_stats: SchedulerStats | None = None
        """What the scheduler said after its last step: requests running and waiting, use of the KV cache."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    # What AsyncLLM calls for each request and step.

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        if self.resources.engine_dead:
            self._forget(request)
            raise EngineDeadError(suppress_context=True)
        if self._quarantine.refuses(request):
            self._forget(request)
            raise _poison()
        entry = self._entries[request.request_id] = _Entry(request)
        if self._open.is_set():
            try:
                await self._send(entry, request)
            except Exception:
                self._forget(request)
                raise

    def _forget(self, request: EngineCoreRequest) -> None:
        """AsyncLLM does not when it cannot add a request, and would take the engine for busy for ever."""
        self._entries.pop(request.request_id, None)
        self._processor.abort_requests([request.request_id], internal=True)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self._entries.pop(name, None)
            self._leave_trial(name)
        with contextlib.suppress(EngineDeadError):
            await self._core.abort_requests_async(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        while True:
            core = self._core
            try:
                outputs: EngineCoreOutputs = await core.get_output_async()
            except Exception as error:
                if not isinstance(error, EngineDeadError):
                    logger.exception("The engine's output cannot be read")
                await self._next_after(core)
                continue
            self._last_step = time.monotonic()
            if outputs.scheduler_stats is not None:
                self.scheduler_stats = outputs.scheduler_stats
            if self._trial is not None:
                self._watch_trial(outputs, self._trial)
            if self._replays:
                self._drop_replayed(outputs)
            return outputs

    # For who watches over it.

    def notice_death(self) -> None:
        """Report a death that no request has run into. To be asked again and again."""
        if len(self._entries) > len(self._processor.request_states):
            self._sweep()
        if self._core.resources.engine_dead and not self.resources.engine_dead:
            self._report(self._core)

    def silent_seconds(self) -> float:
        """For how long the core has finished no step although it has work. To be asked again and again."""
        if self._dead is self._core or not self._processor.request_states:
            self._last_step = time.monotonic()
        return time.monotonic() - self._last_step

    def died(self, *, hung: bool = False) -> None:
        """The core is dead: keep its requests, and blame (see `quarantine`) who may have killed it."""
        entries = self._live_entries()
        begun = [entry for entry in entries if entry.sent]
        fresh = [entry for entry in begun if not self._passed(entry.request.request_id)]
        suspects = {self._client_request(entry): entry.request for entry in fresh or begun}
        guilty = self._quarantine.blame(suspects, CRASHED if hung else self._weight())
        self._quarantine.forget_all_but({self._client_request(entry) for entry in entries})
        for entry in entries:
            entry.sent = False
            if guilty is not None and self._client_request(entry) == guilty:
                logger.error("Request %s killed the engine and is refused from now on", guilty)
                self._fail(entry, _poison())

    async def replace(self, core: AsyncMPClient) -> bool:
        """Go on with `core`: first who is suspected, one at a time, then everyone. False if it dies of it."""
        self._core = core
        self._last_step = time.monotonic()
        self._changed.set()
        self._readmission = readmission = asyncio.create_task(self._readmit())
        await asyncio.wait((readmission,))
        if readmission.cancelled():
            return False
        readmission.result()
        return True

    def give_up(self) -> None:
        """There will be no other core: fail every request, now and later."""
        self._close()
        self.resources.engine_dead = True
        self._changed.set()

    @property
    def unfinished(self) -> int:
        """Requests that have not ended, whether or not a core has them."""
        return len(self._processor.request_states)

    async def _next_after(self, dead: AsyncMPClient) -> None:
        """Until another core is there. Raises `EngineDeadError` when there will be none."""
        if self._core is dead:
            self._report(dead)
            await self._changed.wait()
        if self.resources.engine_dead:
            raise EngineDeadError(suppress_context=True)

    def _report(self, dead: AsyncMPClient) -> None:
        if self._dead is not dead:
            self._dead = dead
            self._changed.clear()
            self._close()
            self._on_death()

    def _weight(self) -> int:
        processes = getattr(self._core.resources.engine_manager, "processes", ())
        killed = any(process.exitcode == -signal.SIGKILL for process in processes)
        return KILLED if killed else CRASHED

    def _close(self) -> None:
        self._open.clear()
        self._trial = None
        if self._readmission is not None:
            self._readmission.cancel()

    async def _send(self, entry: _Entry, request: EngineCoreRequest) -> None:
        entry.sent = True
        core = self._core
        try:
            await core.add_request_async(request)
        except Exception:
            entry.sent = False
            if not core.resources.engine_dead:  # else the next core gets it
                raise

    async def _readmit(self) -> None:
        suspects: dict[str, list[_Entry]] = {}
        for entry in self._live_entries():
            if self._quarantine.suspected(name := self._client_request(entry)):
                suspects.setdefault(name, []).append(entry)
        at_once = -(-len(suspects) // _TRIALS)
        while suspects:
            tried = [entry for name in list(suspects)[:at_once] for entry in suspects.pop(name)]
            self._trial = _Trial(entry.request.request_id for entry in tried)
            for entry in tried:
                await self._resume(entry)
            await self._trial.passed.wait()
        self._trial = None
        # New requests come in while the old ones are sent: open only once none is left behind.
        while waiting := [entry for entry in self._live_entries() if not entry.sent]:
            for entry in waiting:
                await self._resume(entry)
        self._open.set()

    async def _resume(self, entry: _Entry) -> None:
        request, name = entry.request, entry.request.request_id
        state = self._processor.request_states.get(name)
        if state is None:
            self._end(entry)
            return
        entry.replay, entry.done_before = None, 0
        so_far = tokens_so_far(state)
        entry.to_do = len(so_far) + _TRIAL_TOKENS
        try:
            match way_of(request, state):
                case Way.IMPOSSIBLE:
                    raise _cannot_resume()
                case Way.CONTINUE:
                    request = continued(request, state)
                    entry.done_before, entry.to_do = len(so_far), _TRIAL_TOKENS
                case Way.RESTART:
                    restart(request, state, self._processor)
                case Way.REPLAY:
                    entry.replay = Replay(so_far)
                    self._replays += 1
            await self._send(entry, request)
        except Exception as error:  # one that fails must not keep the others from going on
            self._fail(entry, error)
        else:
            self.resumed_total += 1

    def _watch_trial(self, outputs: EngineCoreOutputs, trial: _Trial) -> None:
        for output in outputs.outputs:
            if (name := output.request_id) in trial:
                new = len(output.new_token_ids)
                if output.finish_reason is not None or self._passed(name, new):
                    trial.leave(name)

    def _drop_replayed(self, outputs: EngineCoreOutputs) -> None:
        kept = []
        for output in outputs.outputs:
            entry = self._entries.get(output.request_id)
            if entry is None or entry.replay is None:
                kept.append(output)
                continue
            try:
                if (fresh := entry.replay.fresh(output)) is not None:
                    kept.append(fresh)
            except Diverged:
                self._fail(entry, _cannot_resume())
            if entry.replay.done:
                entry.replay = None
        outputs.outputs = kept
        self._replays = sum(entry.replay is not None for entry in self._entries.values())

    def _fail(self, entry: _Entry, error: Exception) -> None:
        """AsyncLLM aborts what raises in its queue, here and in the core."""
        state = self._processor.request_states.get(entry.request.request_id)
        self._end(entry)
        if state is not None and state.queue is not None:
            state.queue.put(error)

    def _end(self, entry: _Entry) -> None:
        self._entries.pop(entry.request.request_id, None)
        self._leave_trial(entry.request.request_id)

    def _leave_trial(self, name: str) -> None:
        if self._trial is not None:
            self._trial.leave(name)

    def _passed(self, name: str, more: int = 0) -> bool:
        """Is it past where it was at the last death, with `more` tokens that are about to be processed?"""
        if (entry := self._entries.get(name)) is None:
            return True
        if entry.replay is not None:
            return entry.replay.seen + more >= entry.to_do
        state = self._processor.request_states.get(name)
        tokens = 0 if state is None or state.detokenizer is None else state.detokenizer.num_output_tokens()
        return tokens + more - entry.done_before >= entry.to_do

    def _client_request(self, entry: _Entry) -> str:
        """The id that a request has in common with its other answers, where a client asked for several."""
        state: RequestState | None = self._processor.request_states.get(entry.request.request_id)
        return str(state.parent_req.request_id if state and state.parent_req else entry.request.request_id)

    def _live_entries(self) -> list[_Entry]:
        self._sweep()
        return list(self._entries.values())

    def _sweep(self) -> None:
        """Forget what has ended; done now and then, as every token would pay for knowing at once."""
        states = self._processor.request_states
        self._entries = {name: entry for name, entry in self._entries.items() if name in states}


def _poison() -> EngineCrash:
    return EngineCrash(
        "This request made the engine crash twice. It is refused, and so is its like for an hour."
    )


def _cannot_resume() -> EngineDied:
    return EngineDied(
        "The engine stopped while it worked on this request, and what it had begun cannot be continued "
        "exactly. Try again."
    )

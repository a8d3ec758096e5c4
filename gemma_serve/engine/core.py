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
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import SchedulerStats

from ..errors import EngineCrash, EngineDied
from .direct import Flushes
from .entries import TRIAL_TOKENS, Entries, Entry, Trial
from .quarantine import CRASHED, KILLED, Quarantine
from .resume import Diverged, Replay, Way, continued, restart, tokens_so_far, way_of

logger = logging.getLogger(__name__)

_FROM_OUTSIDE = (0, -signal.SIGTERM, -signal.SIGKILL)
"""Exit codes of a core that was told to end, or killed."""
_TRIALS = 32  # suspects beyond that are tried several at a time


class ReplaceableCore:
    """Stands in for vLLM's `AsyncMPClient`; what it does not change goes to the core that runs now.

    `on_death` is called once for each core that dies, in the event loop; then `replace` or `give_up` is due.
    """

    def __init__(self, core: AsyncMPClient, processor: OutputProcessor, on_death: Callable[[], None]) -> None:
        self.resources = SimpleNamespace(engine_dead=False)  # what AsyncLLM asks before it takes a request
        self._core = core
        self._dead: AsyncMPClient | None = None
        self._ending: AsyncMPClient | None = None
        self._processor = processor
        self._on_death = on_death
        self._entries = Entries(processor)
        self._quarantine = Quarantine()
        self._open = asyncio.Event()  # set while the core takes requests
        self._open.set()
        self._changed = asyncio.Event()  # set by each core that comes, and by giving up
        self._readmission: asyncio.Task[None] | None = None
        self._trial: Trial | None = None
        self._replays = 0
        self._last_step = time.monotonic()
        self.flushes = Flushes()
        self.resumed_total = 0
        """Requests that went on after a death, since the start."""
        self.scheduler_stats: dict[int, SchedulerStats] = {}
        """By data parallel rank, what its scheduler said after its last step: requests running and waiting,
        use of the KV cache."""

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
        entry = self._entries.add(request)
        if self._open.is_set():
            try:
                await self._send(entry, request)
            except Exception:
                self._forget(request)
                raise

    def _forget(self, request: EngineCoreRequest) -> None:
        """AsyncLLM does not when it cannot add a request, and would take the engine for busy for ever."""
        self._entries.drop(request.request_id)
        self._processor.abort_requests([request.request_id], internal=True)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self._entries.drop(name)
            self._leave_trial(name)
        with contextlib.suppress(EngineDeadError):
            await self._core.abort_requests_async(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        while True:
            core = self._core
            try:
                if self.flushes.keep_others_waiting():
                    await asyncio.sleep(0)
                self.flushes.after_step()
                outputs: EngineCoreOutputs = await core.get_output_async()
            except Exception as error:
                if not isinstance(error, EngineDeadError):
                    logger.exception("The engine's output cannot be read")
                await self._next_after(core)
                continue
            if core is self._ending or self._gives_up(core, outputs):
                continue
            self.flushes.before_step(len(outputs.outputs))
            self._last_step = time.monotonic()
            if outputs.scheduler_stats is not None:
                self.scheduler_stats[outputs.engine_index] = outputs.scheduler_stats
            if self._trial is not None:
                self._watch_trial(outputs, self._trial)
            if self._replays:
                self._drop_replayed(outputs)
            return outputs

    def _gives_up(self, core: AsyncMPClient, outputs: EngineCoreOutputs) -> bool:
        """A signal told it to end, and what it says from then on is no answer: the next one goes on."""
        if not outputs.outputs or outputs.outputs[0].finish_reason is not FinishReason.ABORT:
            return False
        if core.vllm_config.shutdown_timeout:
            return False  # so set, it finishes what it has, and refuses others
        if any(self._entries.get(output.request_id) for output in outputs.outputs):
            self._ending = core  # else only what was aborted here has crossed with it
            self._open.clear()
        return True

    # For who watches over it.

    def notice_death(self) -> None:
        """Report a death that no request has run into. To be asked again and again."""
        if len(self._entries) > len(self._processor.request_states):
            self._entries.sweep()
        if self._core.resources.engine_dead and not self.resources.engine_dead:
            self._report(self._core)

    def silent_seconds(self) -> float:
        """For how long the core has finished no step although it has work. To be asked again and again."""
        if self._dead is self._core or not self._processor.request_states:
            self._last_step = time.monotonic()
        return time.monotonic() - self._last_step

    def died(self, *, hung: bool = False, killed: bool = False) -> None:
        """The core is dead: keep its requests, and blame (see `quarantine`) who may have killed it.

        `killed`: a worker of it was, from outside.
        """
        entries = self._entries.live()
        begun = [entry for entry in entries if entry.sent]
        fresh = [entry for entry in begun if not self._entries.passed(entry.request.request_id)]
        suspects = {self._entries.client_request(entry): entry.request for entry in fresh or begun}
        guilty = self._quarantine.blame(suspects, self._weight(hung, killed))
        self._quarantine.forget_all_but({self._entries.client_request(entry) for entry in entries})
        for entry in entries:
            entry.sent = False
            if guilty is not None and self._entries.client_request(entry) == guilty:
                logger.error("Request %s killed the engine and is refused from now on", guilty)
                self._fail(entry, _poison())

    async def replace(self, core: AsyncMPClient) -> bool:
        """Go on with `core`: first who is suspected, one at a time, then everyone. False if it dies of it."""
        self._core, self._dead, self._ending = core, None, None
        self.scheduler_stats.clear()
        self._last_step = time.monotonic()
        self._changed.set()
        self._readmission = readmission = asyncio.create_task(self._readmit())
        await asyncio.wait((readmission,))
        if readmission.cancelled():
            return False
        readmission.result()
        return True

    def abandon(self, error: Exception) -> None:
        """Fail every request that has not ended."""
        for entry in self._entries.live():
            self._fail(entry, error)

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
            for future in dead.utility_results.values():  # vLLM would let who called it wait for ever
                if not future.done():
                    future.set_exception(EngineDeadError(suppress_context=True))
            self._changed.clear()
            self._close()
            self._on_death()

    def _weight(self, hung: bool, killed: bool) -> int:
        processes = getattr(self._core.resources.engine_manager, "processes", ())
        # Of several, vLLM ends the others when one has crashed.
        codes = [process.exitcode for process in processes if process.exitcode is not None]
        killed = killed or (bool(codes) and all(code in _FROM_OUTSIDE for code in codes))
        return KILLED if killed and not hung else CRASHED

    def _close(self) -> None:
        self._open.clear()
        self._trial = None
        if self._readmission is not None:
            self._readmission.cancel()

    async def _send(self, entry: Entry, request: EngineCoreRequest) -> None:
        entry.sent = True
        core = self._core
        try:
            await core.add_request_async(request)
        except Exception:
            entry.sent = False
            if not core.resources.engine_dead:  # else the next core gets it
                raise

    async def _readmit(self) -> None:
        suspects: dict[str, list[Entry]] = {}
        for entry in self._entries.live():
            if self._quarantine.suspected(name := self._entries.client_request(entry)):
                suspects.setdefault(name, []).append(entry)
        at_once = -(-len(suspects) // _TRIALS)
        while suspects:
            tried = [entry for name in list(suspects)[:at_once] for entry in suspects.pop(name)]
            self._trial = Trial(entry.request.request_id for entry in tried)
            for entry in tried:
                await self._resume(entry)
            await self._trial.passed.wait()
        self._trial = None
        # New requests come in while the old ones are sent: open only once none is left behind.
        while waiting := [entry for entry in self._entries.live() if not entry.sent]:
            for entry in waiting:
                await self._resume(entry)
                if self._core.resources.engine_dead:
                    await asyncio.Event().wait()  # until its death is reported, which cancels this
        self._open.set()

    async def _resume(self, entry: Entry) -> None:
        request, name = entry.request, entry.request.request_id
        state = self._processor.request_states.get(name)
        if state is None:
            self._end(entry)
            return
        entry.replay, entry.done_before = None, 0
        so_far = tokens_so_far(state)
        entry.to_do = len(so_far) + TRIAL_TOKENS
        try:
            match way_of(request, state):
                case Way.IMPOSSIBLE:
                    raise _cannot_resume()
                case Way.CONTINUE:
                    request = continued(request, state)
                    entry.done_before, entry.to_do = len(so_far), TRIAL_TOKENS
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

    def _watch_trial(self, outputs: EngineCoreOutputs, trial: Trial) -> None:
        for output in outputs.outputs:
            if (name := output.request_id) in trial:
                new = len(output.new_token_ids)
                if output.finish_reason is not None or self._entries.passed(name, new):
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
        self._replays = sum(entry.replay is not None for entry in self._entries)

    def _fail(self, entry: Entry, error: Exception) -> None:
        """AsyncLLM aborts what raises in its queue, here and in the core."""
        state = self._processor.request_states.get(entry.request.request_id)
        self._end(entry)
        if state is not None and state.queue is not None:
            state.queue.put(error)

    def _end(self, entry: Entry) -> None:
        self._entries.drop(entry.request.request_id)
        self._leave_trial(entry.request.request_id)

    def _leave_trial(self, name: str) -> None:
        if self._trial is not None:
            self._trial.leave(name)


def _poison() -> EngineCrash:
    return EngineCrash(
        "This request made the engine crash twice. It is refused, and so is its like for an hour."
    )


def _cannot_resume() -> EngineDied:
    return EngineDied(
        "The engine stopped while it worked on this request, and what it had begun cannot be continued "
        "exactly. Try again."
    )

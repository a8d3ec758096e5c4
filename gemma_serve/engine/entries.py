"""The requests that a `ReplaceableCore` holds until they have ended, and how far each has come."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from .resume import Replay

TRIAL_TOKENS = 4
"""Past the point of the last death; the engine is some steps ahead of what we have from it."""


class Entry:
    """A request that has not ended."""

    __slots__ = ("done_before", "replay", "request", "sent", "to_do")

    def __init__(self, request: EngineCoreRequest) -> None:
        self.request = request
        self.sent = False
        """Does the core that runs now have it?"""
        self.done_before = 0
        """How many of its tokens another core has made."""
        self.to_do = TRIAL_TOKENS
        """How many tokens this core makes before it is past the point at which the last one died."""
        self.replay: Replay | None = None


class Trial:
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


class Entries:
    """By their id; `processor` knows what has come of each."""

    def __init__(self, processor: OutputProcessor) -> None:
        self._processor = processor
        self._entries: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def add(self, request: EngineCoreRequest) -> Entry:
        entry = self._entries[request.request_id] = Entry(request)
        return entry

    def get(self, name: str) -> Entry | None:
        return self._entries.get(name)

    def drop(self, name: str) -> None:
        self._entries.pop(name, None)

    def passed(self, name: str, more: int = 0) -> bool:
        """Is it past where it was at the last death, with `more` tokens that are about to be processed?"""
        if (entry := self._entries.get(name)) is None:
            return True
        if entry.replay is not None:
            return entry.replay.seen + more >= entry.to_do
        state = self._processor.request_states.get(name)
        tokens = 0 if state is None or state.detokenizer is None else state.detokenizer.num_output_tokens()
        return tokens + more - entry.done_before >= entry.to_do

    def client_request(self, entry: Entry) -> str:
        """The id that a request has in common with its other answers, where a client asked for several."""
        state: RequestState | None = self._processor.request_states.get(entry.request.request_id)
        return str(state.parent_req.request_id if state and state.parent_req else entry.request.request_id)

    def live(self) -> list[Entry]:
        self.sweep()
        return list(self._entries.values())

    def sweep(self) -> None:
        """Forget what has ended; done now and then, as every token would pay for knowing at once."""
        states = self._processor.request_states
        self._entries = {name: entry for name, entry in self._entries.items() if name in states}

"""One generation that several requests wait for. It belongs to none: any may leave, the others go on.

Who begins a stream reads it itself, so that a question that nobody else asks costs hardly more than without a
cache. Where others wait and it does not read, as its client is slow or has left, a task reads in its place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextvars import Context, copy_context
from types import AsyncGeneratorType
from typing import cast

from ..engine.base import Delta, Kind, TokenStream, Usage
from ..errors import ServeError, ShuttingDown
from .answer import Answer, answer_id

logger = logging.getLogger(__name__)


class Flight:
    """What the generation has given so far, and who waits for it."""

    def __init__(self, kind: Kind, on_end: Callable[[Flight], None], epoch: str = "") -> None:
        self.kind = kind
        self.epoch = epoch
        """Of the store when it began: what has been emptied meanwhile must not come back."""
        self.deltas: list[Delta] = []
        self.answer: Answer | None = None
        self.error: ServeError | None = None
        self.found = False
        """Was the answer there already?"""
        self.vacant = False
        """Who should have begun it could not, for reasons of its own: the next one may try."""
        self.source: TokenStream | None = None
        """What the engine streams; None before it has begun, and when it answers whole."""
        self.taken_over_at: int | None = None
        """After how many deltas a task began to read in place of who began; None before."""
        self.abandoned = False
        """Has who began it left? It may drive the engine still, but gets no more."""
        self.seats: list[Seat] = []
        self._refusal: ServeError | None = None
        self._on_end = on_end
        self._worker: asyncio.Task[object] | None = None
        self._deltas: AsyncIterator[list[Delta]] | None = None
        self._reader: AsyncGeneratorType[list[Delta], None] | None = None
        self._context: Context | None = None
        self.payer: Seat | None = None
        """The first of those who were there when it ended: the tokens count for it."""
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def ended(self) -> bool:
        return self.answer is not None or self.error is not None or self.vacant

    @property
    def open(self) -> bool:
        """May one join?"""
        return self.error is None and not self.vacant

    @property
    def usage(self) -> Usage:
        """So far."""
        if self.answer is not None:
            return self.answer.usage
        return Usage() if self.source is None else self.source.usage

    def seat(self, begins: bool = False) -> Seat:
        """Wait for it too, or begin it. Leave the seat however that ends."""
        seat = Seat(self, begins)
        self.seats.append(seat)
        return seat

    def work(self, task: asyncio.Task[object]) -> None:
        """`task` generates; the last to leave cancels it."""
        self._worker = task
        task.add_done_callback(_seen)

    def begin(self, source: TokenStream) -> None:
        """The engine streams, driven by who iterates `reader`."""
        self.source, self._deltas, self._context = source, aiter(source), copy_context()
        self._reader = cast("AsyncGeneratorType[list[Delta], None]", self._read(self._deltas))
        self._tell()

    @property
    def reader(self) -> AsyncIterator[list[Delta]]:
        """What who began it gets; it must have begun."""
        assert self._reader is not None
        return self._reader

    async def _read(self, source: AsyncIterator[list[Delta]]) -> AsyncGenerator[list[Delta], None]:
        try:
            async for deltas in source:
                self._add(deltas)
                if self.abandoned:
                    continue
                yield deltas
                if self.taken_over_at is not None:
                    break
        except BaseException as error:
            if self.taken_over_at is None:
                await self._close_source(error)
            raise
        if self.taken_over_at is None:
            await self._close_source()
        if self.abandoned:
            raise asyncio.CancelledError  # to who has left: the engine took it for the generation's
        if self.taken_over_at is not None:
            async for deltas in self.follow(self.taken_over_at):
                yield deltas

    def read_on(self) -> None:
        """See to it that somebody reads."""
        reader = self._reader
        if reader is None or self.ended or self.taken_over_at is not None or reader.ag_running:
            return
        self.taken_over_at = len(self.deltas)
        self.work(asyncio.get_running_loop().create_task(self._read_all(), context=self._context))

    async def _read_all(self) -> None:
        assert self._deltas is not None
        try:
            async for deltas in self._deltas:
                self._add(deltas)
        except BaseException as error:
            await self._close_source(error)
            raise
        await self._close_source()

    def _add(self, deltas: list[Delta]) -> None:
        self.deltas += deltas
        if self._waiters:
            self._tell()

    async def _close_source(self, error: BaseException | None = None) -> None:
        assert self.source is not None
        if error is not None:
            self.end(error)
        await self.source.aclose()
        self.end(Answer.of_stream(self.kind, self.source, self.deltas))

    async def put_down(self) -> None:
        """Who began it does not read any more."""
        if self._reader is not None and not self._reader.ag_running:
            await self._reader.aclose()

    async def follow(self, position: int = 0) -> AsyncIterator[list[Delta]]:
        """The deltas after the first `position`: those that are there at once. Raises `ServeError`."""
        while True:
            if position < (count := len(self.deltas)):
                deltas, position = self.deltas[position:count], count
                yield deltas
            elif not self.ended:
                await self.news()
            elif self.error is not None:
                raise self.error.with_traceback(None)
            else:
                if not position and self.answer is not None and (deltas := self.answer.deltas()):
                    yield deltas
                return

    def end(self, result: Answer | BaseException, *, found: bool = False) -> None:
        """Only the first call counts. `found` is an answer that nobody has to pay for."""
        if self.ended:
            return
        self.payer = self.seats[0] if self.seats and not found else None
        if isinstance(result, Answer):
            self.answer, self.found = result, found
        elif isinstance(result, ServeError):
            self.error = result
        elif isinstance(result, Exception):
            logger.error("A shared generation failed", exc_info=result)
            self.error = ServeError("The engine failed on this request; the server's log says why.")
        else:  # cancelled: all have left, or
            self.error = ShuttingDown("The server is shutting down and could not finish this answer.")
        self._on_end(self)
        self._tell()

    def vacate(self, refusal: ServeError | None = None) -> None:
        """It will not begin, for the `refusal` of who should have; those who wait see to it themselves."""
        if not self.ended:
            self.vacant, self._refusal = True, refusal
            self._on_end(self)
            self._tell()

    async def close(self) -> None:
        """Stop the generation, if it still runs."""
        self.end(asyncio.CancelledError())
        worker = self._worker
        if worker is not None and worker is not asyncio.current_task() and not worker.done():
            worker.cancel()
            await asyncio.wait([worker])
        await self.put_down()
        if self.source is not None:
            await self.source.aclose()  # nobody has, where nobody has begun to read

    def _tell(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def news(self) -> None:
        """Until there is more than now."""
        self.read_on()
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter


class Seat:
    """One request's place in a flight."""

    def __init__(self, flight: Flight, begins: bool) -> None:
        self.flight = flight
        self.begins = begins
        self.left = False

    @property
    def pays(self) -> bool:
        return self.flight.payer is self

    @property
    def alone(self) -> bool:
        return len(self.flight.seats) == 1

    async def ready(self) -> None:
        """Until tokens may come. Raises `ServeError`, but says nothing of a flight that is vacant."""
        flight = self.flight
        while flight.source is None and not flight.ended:
            await flight.news()
        if flight.error is not None and not flight.deltas:
            raise flight.error.with_traceback(None)

    async def answer(self) -> Answer:
        """The whole answer. Raises `ServeError`."""
        flight = self.flight
        while not flight.ended:
            await flight.news()
        if (error := flight.error or flight._refusal) is not None:
            raise error.with_traceback(None)
        assert flight.answer is not None
        return flight.answer

    async def leave(self) -> None:
        """The last to leave stops the generation; a second call does nothing."""
        if self.left:
            return
        self.left = True
        flight = self.flight
        flight.abandoned |= self.begins
        flight.seats.remove(self)
        if flight.ended:
            return
        if flight.seats:
            flight.read_on()
        elif flight._worker is None:
            flight.vacate()  # one may come before this has been seen
        else:
            await flight.close()


class SeatStream:
    """A `TokenStream` of a flight: first all that it has given already, then what it gives."""

    def __init__(self, seat: Seat, request_id: str) -> None:
        """The flight must have begun."""
        flight = seat.flight
        head = flight.source or flight.answer
        assert head is not None
        self.id = answer_id(flight.kind, request_id)
        self.created, self.model, self.fingerprint = head.created, head.model, head.fingerprint
        self._seat = seat

    @property
    def usage(self) -> Usage:
        return self._seat.flight.usage

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        return self._seat.flight.reader if self._seat.begins else self._seat.flight.follow()

    async def aclose(self) -> None:
        await self._seat.leave()


def _seen(task: asyncio.Task[object]) -> None:
    """What it raised has been told by `end`."""
    if not task.cancelled():
        task.exception()

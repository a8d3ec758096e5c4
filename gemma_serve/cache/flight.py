"""One generation that several requests wait for. It belongs to none: any may leave, the others go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ..engine.base import Delta, Kind, TokenStream, Usage
from ..errors import ServeError, ShuttingDown
from .answer import Answer, answer_id


class Flight:
    """What the generation has given so far, and who waits for it."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.answer: Answer | None = None
        self.error: ServeError | None = None
        self.vacant = False
        """Who should have begun it could not, for reasons of its own: the next one may try."""
        self.admitted = False
        """Has the engine got it?"""
        self.keep = True
        """Is its answer to be stored?"""
        self.source: TokenStream | None = None
        """What the engine streams; None before it has begun, and when it answers whole."""
        self.task: asyncio.Task[None] | None = None
        self._seats: list[Seat] = []
        self._payer: Seat | None = None
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def ended(self) -> bool:
        return self.answer is not None or self.error is not None or self.vacant

    @property
    def open(self) -> bool:
        """May one join?"""
        return not self.vacant and self.error is None

    @property
    def usage(self) -> Usage:
        """So far."""
        if self.answer is not None:
            return self.answer.usage
        return Usage() if self.source is None else self.source.usage

    @property
    def payer(self) -> Seat | None:
        """The first of those who are there still, or were when it ended: the tokens count for it."""
        return self._payer if self.ended else next(iter(self._seats), None)

    def seat(self, begins: bool = False) -> Seat:
        """Wait for it too, or begin it. Leave the seat however that ends."""
        seat = Seat(self, begins)
        self._seats.append(seat)
        return seat

    def begin(self, source: TokenStream) -> None:
        self.source = source
        self._tell()

    def add(self, deltas: list[Delta]) -> None:
        self.deltas += deltas
        self._tell()

    def end(self, result: Answer | BaseException, *, paid: bool = False) -> None:
        """Only the first call counts. `paid` is an answer that was there already."""
        if self.ended:
            return
        self._payer = None if paid else self.payer
        if isinstance(result, Answer):
            self.answer = result
        elif isinstance(result, ServeError):
            self.error = result
        elif isinstance(result, asyncio.CancelledError):
            self.error = ShuttingDown("The server is shutting down and could not finish this answer.")
        else:
            self.error = ServeError("The engine failed on this request; the server's log says why.")
        self._tell()

    def vacate(self) -> None:
        """It will not begin; those who wait see to it themselves."""
        self.vacant = True
        self._tell()

    def _tell(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def news(self) -> None:
        """Until there is more than now."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter


class Seat:
    """One request's place in a flight."""

    def __init__(self, flight: Flight, begins: bool) -> None:
        self.flight = flight
        self._begins = begins

    @property
    def pays(self) -> bool:
        return self.flight.payer is self

    async def begun(self) -> None:
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
        if flight.error is not None:
            raise flight.error.with_traceback(None)
        assert flight.answer is not None
        return flight.answer

    async def leave(self) -> None:
        """The last to leave stops the generation; a second call does nothing."""
        flight = self.flight
        if self not in flight._seats:
            return
        flight._seats.remove(self)
        if flight.task is None:
            if self._begins:
                flight.vacate()
        elif not flight._seats and not flight.ended:
            flight.end(asyncio.CancelledError())
            flight.task.cancel()
            await asyncio.wait([flight.task])


class SeatStream:
    """A `TokenStream` of a flight: first all that it has given already, then what it gives."""

    def __init__(self, seat: Seat, kind: Kind, request_id: str) -> None:
        """The flight must have begun."""
        self._seat = seat
        self.id = answer_id(kind, request_id)
        head = seat.flight.source or seat.flight.answer
        assert head is not None
        self.created, self.model, self.fingerprint = head.created, head.model, head.fingerprint

    @property
    def usage(self) -> Usage:
        return self._seat.flight.usage

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        flight, position = self._seat.flight, 0
        while True:
            if position < (count := len(flight.deltas)):
                deltas, position = flight.deltas[position:count], count
                yield deltas
            elif not flight.ended:
                await flight.news()
            else:
                break
        answer = await self._seat.answer()
        if not position:
            yield answer.stream()

    async def aclose(self) -> None:
        await self._seat.leave()

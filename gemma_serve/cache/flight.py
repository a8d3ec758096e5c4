"""One generation that several requests wait for. It belongs to none: any may leave, the others go on.

It runs in a task of its own and writes what comes into every stream that waits, without waking a task for
each token. Who cannot be written to at once is woken to write for itself: nobody waits for a slow client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..engine.base import Delta, Kind, Sink, StreamHead, Usage
from ..errors import ServeError, ShuttingDown
from .answer import Answer, Piece, Run, answer_id, put_pieces

logger = logging.getLogger(__name__)


class Flight:
    """What the generation has given so far, and who waits for it. It is the `Sink` of the engine's stream."""

    def __init__(self, kind: Kind, on_end: Callable[[Flight], None], epoch: str = "") -> None:
        self.kind = kind
        self.epoch = epoch
        """Of the store when it began: what has been emptied meanwhile must not come back."""
        self.pieces: list[Piece] = []
        self.answer: Answer | None = None
        self.error: ServeError | None = None
        self.found = False
        """Was the answer there already?"""
        self.vacant = False
        """Who should have begun it could not, for reasons of its own: the next one may try."""
        self.source: StreamHead | None = None
        """What the engine streams; None before it has begun, and when it answers whole."""
        self.seats: list[Seat] = []
        self.task: asyncio.Task[None] | None = None
        """That generates; the last to leave cancels it."""
        self.on_first_token: Callable[[], None] = lambda: None
        self._refusal: ServeError | None = None
        self._on_end = on_end
        self._for_the_start: list[asyncio.Future[None]] = []
        self._for_the_end: list[asyncio.Future[None]] = []

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

    def begin(self, source: StreamHead) -> None:
        self.source = source
        _wake(self._for_the_start)

    def put(self, delta: Delta) -> None:
        if not self.pieces:
            self.on_first_token()
        self.pieces.append(delta)
        for seat in self.seats:
            try:
                if seat.sink is not None:
                    seat.sink.put(delta)
            except Exception as error:  # it is this one's trouble, not that of the others
                seat.fail(error)

    def put_texts(self, texts: list[str]) -> None:
        if not self.pieces:
            self.on_first_token()
        self.pieces.append(Run(0, texts))
        for seat in self.seats:
            try:
                if seat.sink is not None:
                    seat.sink.put_texts(texts)
            except Exception as error:
                seat.fail(error)

    def flush(self) -> bool:
        for seat in self.seats:
            try:
                if seat.sink is not None and not seat.sink.flush():
                    seat.stop_listening()
            except Exception as error:
                seat.fail(error)
        return True

    async def drain(self) -> None:
        self.flush()

    def end(self, result: Answer | BaseException, *, found: bool = False) -> None:
        """Only the first call counts. `found` is an answer that nobody has to pay for."""
        if self.ended:
            return
        if self.seats and not found:
            self.seats[0].pays = True
        if isinstance(result, Answer):
            self.answer, self.found = result, found
        elif isinstance(result, ServeError):
            self.error = result
        elif isinstance(result, Exception):
            logger.error("A shared generation failed", exc_info=result)
            self.error = ServeError("The engine failed on this request; the server's log says why.")
        else:  # cancelled: all have left, or
            self.error = ShuttingDown("The server is shutting down and could not finish this answer.")
        self._land()

    def vacate(self, refusal: ServeError | None = None) -> None:
        """It will not begin, for the `refusal` of who should have; those who wait see to it themselves."""
        if not self.ended:
            self.vacant, self._refusal = True, refusal
            self._land()

    def _land(self) -> None:
        self._on_end(self)
        for seat in self.seats:
            if seat.sink is not None:
                seat.stop_listening()
        _wake(self._for_the_start)
        _wake(self._for_the_end)

    async def close(self) -> None:
        """Stop the generation, if it still runs."""
        self.end(asyncio.CancelledError())
        if self.task is not None and not self.task.done():
            self.task.cancel()
            await asyncio.wait([self.task])

    async def begun(self) -> None:
        """Until tokens may come, or it has ended."""
        if self.source is None and not self.ended:
            await _until(self._for_the_start)

    async def landed(self) -> Answer:
        """The whole answer. Raises `ServeError`."""
        if not self.ended:
            await _until(self._for_the_end)
        if (error := self.error or self._refusal) is not None:
            raise error.with_traceback(None)
        assert self.answer is not None
        return self.answer


class Seat:
    """One request's place in a flight."""

    def __init__(self, flight: Flight, begins: bool) -> None:
        self.flight = flight
        self.begins = begins
        self.pays = False
        """The tokens count for the first of those who were there when it ended."""
        self.left = False
        self.sink: Sink | None = None
        """It has all that came, and is given what comes at once; None while it has to be waited for."""
        self._position = 0
        """How many of the flight's pieces `feed` has given its sink."""
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None]

    @property
    def alone(self) -> bool:
        return len(self.flight.seats) == 1

    async def ready(self) -> None:
        """Until tokens may come. Raises `ServeError`, but says nothing of a flight that is vacant."""
        flight = self.flight
        await flight.begun()
        if flight.error is not None and not flight.pieces:
            raise flight.error.with_traceback(None)

    async def feed(self, sink: Sink) -> None:
        """Give `sink` all that was and all that comes. Raises `ServeError`."""
        flight = self.flight
        while True:
            if behind := flight.pieces[self._position :]:
                self._position += len(behind)
                put_pieces(sink, behind)
            await sink.drain()
            if self._position < len(flight.pieces):
                continue
            if flight.ended:
                break
            await self._listen(sink)
        answer = await flight.landed()
        if not flight.pieces:  # it was not streamed
            put_pieces(sink, answer.pieces())
            await sink.drain()

    async def _listen(self, sink: Sink) -> None:
        """Until the flight ends, or `sink` has to be waited for. Raises what the sink does."""
        self.sink = sink
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self.sink = None
        if self._error is not None:
            raise self._error

    def stop_listening(self) -> None:
        self.sink = None
        self._position = len(self.flight.pieces)
        if not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        self._error = error
        self.stop_listening()

    async def leave(self) -> None:
        """The last to leave stops the generation; a second call does nothing."""
        if self.left:
            return
        self.left = True
        flight = self.flight
        flight.seats.remove(self)
        if flight.ended:
            return
        if flight.task is None:
            if self.begins:  # while it looked for the answer in Redis: the next one may begin
                flight.vacate()
        elif not flight.seats:
            await flight.close()


class SeatHead:
    """The `StreamHead` of a flight: all but the id is known once tokens come."""

    def __init__(self, flight: Flight, request_id: str) -> None:
        self.id = answer_id(flight.kind, request_id)
        self._flight = flight

    @property
    def created(self) -> int:
        return self._head.created

    @property
    def model(self) -> str:
        return self._head.model

    @property
    def fingerprint(self) -> str | None:
        return self._head.fingerprint

    @property
    def usage(self) -> Usage:
        return self._flight.usage

    @property
    def _head(self) -> StreamHead | Answer:
        head = self._flight.source or self._flight.answer
        assert head is not None
        return head


def _wake(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()


async def _until(waiters: list[asyncio.Future[None]]) -> None:
    waiters.append(waiter := asyncio.get_running_loop().create_future())
    await waiter

"""A message of a WebSocket as a request: authenticated, limited, logged and drained as one over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

from ..chat_protocol import POLICY_VIOLATION, SERVER_FAILED
from ..clients import authenticate_again, current_client
from ..drain import Drain
from ..errors import DeadlineExceeded, PermissionDenied, ServeError, Unauthenticated
from ..logs import RequestRecord, current_request, log_request
from ..rate_limit import Lease, RateLimiter, current_lease
from ..tracing import Tracing, current_trace
from .ws_outbox import ClientLeft, Outbox, Reply

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MessageRequest:
    kind: str
    message_id: str | None
    """Its client's."""
    id: str
    """Ours, for the log."""
    address: str
    """Of the client."""
    work: Callable[[RequestRecord], Awaitable[Reply]]
    """Answers the message. Raises `ServeError`, `ClientLeft`."""
    out: Outbox
    stopped: Callable[[RequestRecord], Reply | None] = lambda record: None
    """What to tell when the request was cancelled; None where nobody hears it."""


class MessageRequests:
    """Runs them, each in a task of its own, which gives it a context."""

    def __init__(self, limiter: RateLimiter, drain: Drain, tracing: Tracing | None = None) -> None:
        self._limiter = limiter
        self._drain = drain
        self._tracing = tracing

    @contextlib.contextmanager
    def drained(self) -> Iterator[None]:
        """Within it the server's end waits."""
        self._drain.enter()
        try:
            yield
        finally:
            self._drain.leave()

    async def run(self, request: MessageRequest) -> None:
        """From its key to its line in the log."""
        started = time.perf_counter()
        record = RequestRecord(request.id)
        current_request.set(record)
        trace = None if self._tracing is None else self._tracing.begin(record)
        current_trace.set(trace)
        with self.drained():
            try:
                reply = await self._reply(request, record)
                await request.out.reply(reply)
                record.status, record.finished = reply.status, True
            except ClientLeft:
                pass
            finally:
                seconds = time.perf_counter() - started
                log_request("WEBSOCKET", f"/ws {request.kind}", request.address, record, seconds)
                if trace is not None:
                    trace.end(f"/ws {request.kind}", record, {"http.route": "/ws"})

    async def _reply(self, request: MessageRequest, record: RequestRecord) -> Reply:
        lease: Lease | None = None
        try:
            client = await authenticate_again.get()()
            current_client.set(client)
            record.key = client.key
            lease = await self._limiter.admit(client)
            current_lease.set(lease)
            return await request.work(record)
        except ClientLeft:
            raise
        except asyncio.CancelledError:
            task, reply = asyncio.current_task(), request.stopped(record)
            if reply is None or task is None:
                raise
            task.uncancel()
            return reply
        except ServeError as error:
            gone = lease is None and isinstance(error, Unauthenticated | PermissionDenied)
            return Reply(
                request.out.error(request.message_id, error), error.status, POLICY_VIOLATION if gone else None
            )
        except Exception:
            logger.exception("A WebSocket's message failed unexpectedly")
            failure = ServeError("The server failed on this message; its log says why.")
            return Reply(request.out.error(request.message_id, failure), failure.status, SERVER_FAILED)
        finally:
            if lease is not None:  # before the client knows, which may send its next message at once
                await lease.settle(record.prompt_tokens, record.completion_tokens)


@contextlib.asynccontextmanager
async def deadline(seconds: float, record: RequestRecord) -> AsyncIterator[None]:
    """Raises `DeadlineExceeded` into what takes longer; 0 is no limit."""
    loop, timer = asyncio.get_running_loop(), None
    try:
        async with asyncio.timeout(None) as limit:

            def expire() -> None:
                record.overdue = True  # before the generation ends, which is counted by it
                limit.reschedule(loop.time())

            if seconds:
                timer = loop.call_later(seconds, expire)
            try:
                yield
            finally:
                if timer is not None:
                    timer.cancel()
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded(f"The answer was not finished within {seconds:g} s.") from None

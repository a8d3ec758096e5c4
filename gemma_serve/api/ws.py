"""`/ws`: one chat over a WebSocket. README has its protocol, `chat_protocol.py` its messages.

A connection that waits costs its frames and an id: its session has the history, one sweep looks after all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from ..chat_protocol import (
    GOING_AWAY,
    POLICY_VIOLATION,
    SERVER_FAILED,
    SUBPROTOCOL,
    Data,
    Load,
    Regenerate,
    Resume,
    System,
)
from ..clients import Client, current_client
from ..connections import Connections, Reason
from ..errors import Conflict, ServeError, ShuttingDown
from ..generation import Generator
from ..logs import RequestRecord, current_request
from ..models import Models
from ..sessions import Session, Sessions
from ..settings import Settings
from .ws_answer import Answer
from .ws_inbox import CHEAP, Faults, WrongMessage, read_message
from .ws_outbox import ClientLeft, Outbox, Reply
from .ws_request import MessageRequest, MessageRequests, deadline
from .ws_tokens import Tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chats:
    """The ASGI application behind `/ws`, and what its connections share."""

    settings: Settings
    generator: Generator
    models: Models
    sessions: Sessions
    connections: Connections
    requests: MessageRequests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = current_client.get()
        assert client is not None  # authentication has let it in
        connection = ChatConnection(self, client, scope, receive, send)
        self.connections.enter(connection)
        try:
            await connection.run(SUBPROTOCOL if SUBPROTOCOL in scope["subprotocols"] else None)
        finally:
            self.connections.leave(connection)


class ChatConnection:
    __slots__ = (
        "_address",
        "_answer",
        "_chats",
        "_faults",
        "_id",
        "_leaving",
        "_number",
        "_out",
        "_receive",
        "_remembered",
        "_stop",
        "_stoppable",
        "client",
        "last_used",
    )

    def __init__(self, chats: Chats, client: Client, scope: Scope, receive: Receive, send: Send) -> None:
        record = current_request.get()
        self.client = client
        self.last_used = time.monotonic()
        self._address = (scope.get("client") or ("-",))[0]
        self._answer: asyncio.Task[None] | None = None
        self._chats = chats
        self._faults = Faults()
        self._id = record.id if record else "ws"
        self._leaving: asyncio.Task[None] | None = None
        self._number = 0
        self._out = Outbox(scope, send)
        self._receive = receive
        self._remembered = 0  # messages of the session, as far as this client knows
        self._stop: ServeError | bool = False  # why the running answer is to end; True: its client wishes it
        self._stoppable = False

    async def run(self, subprotocol: str | None) -> None:
        """Until the connection ends."""
        if (await self._receive())["type"] != "websocket.connect":
            return
        try:
            await self._out.accept(subprotocol)
            await self._out.send(self._state(None, Session("")))
            while not self._out.closed and (event := await self._receive())["type"] == "websocket.receive":
                if self._answer is None:
                    self.last_used = time.monotonic()
                await self._take(event)
        except ClientLeft:
            pass
        except Exception:
            with contextlib.suppress(ClientLeft):
                await self._out.close(SERVER_FAILED)
            raise  # into the log
        finally:
            self._out.closed = True
            if self._answer is not None:
                self._answer.cancel()
                await asyncio.wait({self._answer})

    # --- messages in

    async def _take(self, event: Message) -> None:
        try:
            message = read_message(event, self._chats.settings)
        except WrongMessage as wrong:
            await self._out.send(self._out.error(wrong.id, wrong.error))
            await self._fault()
            return
        await self._dispatch(*message)

    async def _dispatch(self, kind: str, message_id: str | None, data: Data) -> None:
        refusal: ServeError | None = None
        if kind == "ping":
            await self._out.say("pong", message_id, {})
            return await self._fault(CHEAP)
        if kind == "cancel":
            if self._stop_answer(True):
                return await self._fault(CHEAP)
            refusal = Conflict("No answer is running.", code="no_answer_running")
        elif self._leaving is not None:
            refusal = ShuttingDown("This connection is closing. Connect again.", retry_after=1)
        elif self._answer is not None and kind != "history":
            refusal = Conflict("An answer is running. Wait for its end, or cancel it.", code="answer_running")
        if refusal is not None:
            await self._out.send(self._out.error(message_id, refusal))
            return await self._fault(CHEAP)
        if isinstance(data, Regenerate):
            return await self._start_answer(kind, message_id, data)
        work = self._request(kind, message_id, lambda record: self._change(kind, message_id, data))
        await asyncio.create_task(self._chats.requests.run(work))

    def _request(
        self,
        kind: str,
        message_id: str | None,
        work: Callable[[RequestRecord], Awaitable[Reply]],
        **more: Any,
    ) -> MessageRequest:
        self._number += 1
        request_id = f"{self._id}-{self._number}"
        return MessageRequest(kind, message_id, request_id, self._address, work, self._out, **more)

    async def _fault(self, weight: float = 1.0) -> None:
        """Who sends many wrong messages within a minute is left."""
        if self._faults.too_many(weight):
            await self._out.close(POLICY_VIOLATION, "too many wrong messages")

    # --- the session

    async def _change(self, kind: str, message_id: str | None, data: Data) -> Reply:
        """Answer what needs no engine."""
        sessions, owner = self._chats.sessions, _owner()
        if kind == "history":
            session = await sessions.find(self._out.session_id, owner) or Session(owner)
            history = {"system": session.system, "messages": session.messages}
            return Reply(self._out.message("history", message_id, history))
        if isinstance(data, Resume):
            if data.session_id is None:
                self._out.session_id, session = sessions.new_id(), Session(owner)
            else:
                session = await sessions.resume(data.session_id, owner)
                self._out.session_id = data.session_id
        elif isinstance(data, System):
            session = await sessions.edit(self._out.session_id, owner, system=data.message)
        elif isinstance(data, Load):
            messages = [one.model_dump() for one in data.messages]
            session = await sessions.edit(self._out.session_id, owner, system=data.system, messages=messages)
        else:
            session = await sessions.edit(self._out.session_id, owner, messages=[])
        self._remembered = len(session.messages)
        return Reply(self._state(message_id, session))

    # --- answers

    async def _start_answer(self, kind: str, message_id: str | None, data: Regenerate) -> None:
        chats = self._chats
        tokens = Tokens(self._out, message_id, data.stream)
        answer = Answer(data, tokens, self._remembered, chats.generator, chats.models, chats.settings)

        def stopped(record: RequestRecord) -> Reply | None:
            if isinstance(self._stop, ServeError):
                return Reply(self._out.error(message_id, self._stop), self._stop.status)
            told = self._out.message("cancelled", message_id, answer.data(record, "cancelled"))
            return Reply(told, 499) if self._stop else None

        self._stop, self._stoppable = False, True
        self.last_used = math.inf
        request = self._request(
            kind, message_id, lambda record: self._write(answer, message_id, record), stopped=stopped
        )
        self._answer = asyncio.create_task(chats.requests.run(request))
        self._answer.add_done_callback(self._answer_ended)
        await asyncio.sleep(0)  # until it has begun: what is cancelled before that never hears of it

    async def _write(self, answer: Answer, message_id: str | None, record: RequestRecord) -> Reply:
        chats, session_id, owner = self._chats, self._out.session_id, _owner()
        try:
            async with deadline(chats.settings.limits.request_timeout_seconds, record):
                session = await chats.sessions.find(session_id, owner)
                forgotten = 0 if session else self._remembered  # expired, or crowded out
                if dropped := await answer.prepare(session or Session(owner)) + forgotten:
                    left = {"dropped": dropped, "messages": answer.history_messages}
                    await self._out.say("trimmed", message_id, left)
                await answer.write()
        finally:
            self._stoppable = False
            await answer.keep(chats.sessions, session_id, owner)
            self._remembered = answer.messages
        return Reply(self._out.message("message", message_id, answer.data(record)))

    def _stop_answer(self, why: ServeError | bool) -> bool:
        """Whether there was one that could still be stopped."""
        if self._answer is None or not self._stoppable:
            return False
        self._stop, self._stoppable = why, False
        self._answer.cancel()
        return True

    def _answer_ended(self, task: asyncio.Task[None]) -> None:
        self._answer = None
        self.last_used = time.monotonic()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("A WebSocket's answer failed unexpectedly", exc_info=error)

    # --- what the sweep and the server's end ask for

    def go_away(self, reason: Reason) -> None:
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave(reason))

    async def _leave(self, reason: Reason) -> None:
        with self._chats.requests.drained():
            try:
                await self._out.say("going_away", None, {"reason": reason})
                if self._answer is not None:
                    await asyncio.wait({self._answer})
                await self._out.close(GOING_AWAY)
            except ClientLeft:
                pass

    def give_up(self) -> None:
        self._stop_answer(ShuttingDown("The server is shutting down and could not finish this answer."))

    def _state(self, message_id: str | None, session: Session) -> bytes:
        chats = self._chats
        data = {
            "model": chats.models.default,
            "context_length": chats.models.context_length(),
            "system": session.system,
            "messages": len(session.messages),
            "ttl_seconds": chats.settings.chat.session_ttl_seconds,
        }
        return self._out.message("session", message_id, data)


def _owner() -> str:
    client = current_client.get()
    return (client and client.key) or ""

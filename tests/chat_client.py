"""A client of `/ws` for the tests: messages as they are, none added, none skipped."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import websockets
from fastapi import FastAPI
from websockets.asyncio.client import ClientConnection

from gemma_serve.app import create_app
from gemma_serve.drain import Drain

from .fake_engine import FakeEngine
from .test_app import settings

Reply = dict[str, Any]

HELLO = [("user", "Hi"), ("assistant", "Hello world")]
"""The history after one question to the fake engine."""


class ChatClient:
    def __init__(self, socket: ClientConnection, first: Reply) -> None:
        self.socket = socket
        self.first = first
        self._ids = itertools.count(1)

    @property
    def session_id(self) -> str:
        return str(self.first["session_id"])

    async def send(self, kind: str, **data: Any) -> str:
        """Returns the message's id."""
        message_id = str(next(self._ids))
        await self.socket.send(json.dumps({"type": kind, "id": message_id, "data": data}))
        return message_id

    async def recv(self) -> Reply:
        reply: Reply = json.loads(await self.socket.recv())
        assert set(reply) == {"type", "session_id", "id", "data"}
        return reply

    async def replies(self) -> list[Reply]:
        """Up to the first that ends an answer."""
        found: list[Reply] = []
        while not found or found[-1]["type"] in ("token", "trimmed"):
            found.append(await self.recv())
        return found

    async def ask(self, kind: str, **data: Any) -> Reply:
        """What ends the answer to this message."""
        message_id = await self.send(kind, **data)
        replies = await self.replies()
        assert all(reply["id"] == message_id for reply in replies)
        return replies[-1]

    async def history(self) -> list[tuple[str, str]]:
        messages = (await self.ask("history"))["data"]["messages"]
        return [(message["role"], message["content"]) for message in messages]


def app_of(engine: FakeEngine | None = None, drain: Drain | None = None, **sections: Any) -> FastAPI:
    return create_app(settings(**sections), engine or FakeEngine(), drain=drain)


def ws(url: str) -> str:
    return url.replace("http", "ws", 1) + "/ws"


@asynccontextmanager
async def chatting(url: str, key: str | None = None, **options: Any) -> AsyncIterator[ChatClient]:
    if key is not None:
        options["additional_headers"] = {"Authorization": f"Bearer {key}"}
    async with websockets.connect(ws(url), **options) as socket:
        first = json.loads(await socket.recv())
        assert first["type"] == "session"
        yield ChatClient(socket, first)


async def closed(client: ChatClient) -> tuple[list[Reply], int | None]:
    """What still comes, and the code of the close."""
    replies = []
    try:
        while True:
            replies.append(await client.recv())
    except websockets.ConnectionClosed as error:
        return replies, error.rcvd.code if error.rcvd else None

"""Reads what an engine core sends without pyzmq's futures, of which each message would take some.

At one stream each token is a message of its own: `zmq.asyncio` was a quarter of what the event loop did.
"""

from __future__ import annotations

import asyncio
from typing import Literal

import zmq
import zmq.asyncio


class Receiver:
    """Reads for `socket` from now on, in the loop that asks first, until the socket is closed."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Socket.shadow(socket)
        self._descriptor: int = self._socket.FD
        self._close = socket.close
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.Future[None] | None = None
        socket.recv_multipart = self.recv_multipart  # type: ignore[assignment, method-assign]
        socket.close = self.close  # type: ignore[method-assign]

    async def recv_multipart(self, *, copy: Literal[False]) -> list[zmq.Frame]:
        """A message that is there comes without a round of the loop. For one caller at a time."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._descriptor, self._wake)
        while True:
            try:
                frames = [self._socket.recv(zmq.DONTWAIT, copy=copy)]
            except zmq.Again:
                # Only now does the descriptor tell of the next: it is edge-triggered (ZMQ_FD).
                self._waiting = self._loop.create_future()
                await self._waiting
                continue
            while frames[-1].more:
                frames.append(self._socket.recv(copy=copy))
            return frames

    def close(self, linger: int | None = None) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)
        self._close(linger)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
        else:
            # Nobody reads, as after the last word of a dying engine: unless zmq hears of it, the descriptor
            # stays readable, and the loop would call this for ever.
            self._socket.get(zmq.EVENTS)

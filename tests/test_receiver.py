"""Reading from an engine core: real sockets, in both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zmq
import zmq.asyncio

from gemma_serve.engine.receiver import Receiver

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/s"


def receiving(address: str) -> zmq.asyncio.Socket:
    socket = zmq.asyncio.Context().socket(zmq.PULL)
    socket.bind(address)
    Receiver(socket)
    return socket


def sending(address: str) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.PUSH)
    socket.connect(address)
    return socket


def close(socket: zmq.asyncio.Socket | zmq.Socket[bytes]) -> None:
    context = socket.context
    socket.close(linger=0)
    context.term()


@contextlib.contextmanager
def connected(address: str) -> Iterator[tuple[zmq.asyncio.Socket, zmq.Socket[bytes]]]:
    socket, sender = receiving(address), sending(address)
    try:
        yield socket, sender
    finally:
        close(sender)
        close(socket)


def test_all_that_was_sent_comes_whole_and_in_order(run: Run, address: str) -> None:
    sent = [[b"%d" % number] * (1 + number % 3) for number in range(3000)]
    asked = threading.Event()

    def send() -> None:
        socket = sending(address)
        for number, message in enumerate(sent):
            if number % 100 == 0:  # the reader has got to the end, and waits
                asked.wait(20)
                asked.clear()
            socket.send_multipart(message, copy=False)
        socket.close()
        socket.context.term()

    async def read() -> None:
        socket = receiving(address)
        thread = threading.Thread(target=send)
        thread.start()
        for number, message in enumerate(sent):
            if number % 100 == 0:
                asyncio.get_running_loop().call_later(0.001, asked.set)
            frames = await asyncio.wait_for(socket.recv_multipart(copy=False), 20)
            assert [frame.bytes for frame in frames] == message
        thread.join()
        close(socket)

    run(read())


def test_others_go_on_while_it_waits(run: Run, address: str) -> None:
    async def read() -> None:
        with connected(address) as (socket, sender):
            waiting = asyncio.ensure_future(socket.recv_multipart(copy=False))
            for _ in range(100):
                await asyncio.sleep(0)
            assert not waiting.done()
            sender.send(b"token")
            assert [frame.bytes for frame in await asyncio.wait_for(waiting, 20)] == [b"token"]

    run(read())


def test_nothing_is_lost_to_a_reader_that_was_cancelled(run: Run, address: str) -> None:
    async def read() -> None:
        with connected(address) as (socket, sender):
            waiting = asyncio.ensure_future(socket.recv_multipart(copy=False))
            await asyncio.sleep(0)
            waiting.cancel()
            sender.send(b"token")
            frames = await asyncio.wait_for(socket.recv_multipart(copy=False), 20)
            assert [frame.bytes for frame in frames] == [b"token"]

    run(read())


def test_a_closed_socket_leaves_no_reader_behind(run: Run, address: str) -> None:
    async def read() -> None:
        socket = receiving(address)
        descriptor = socket.FD
        waiting = asyncio.ensure_future(socket.recv_multipart(copy=False))
        await asyncio.sleep(0)
        close(socket)
        assert not asyncio.get_running_loop().remove_reader(descriptor)
        waiting.cancel()

    run(read())


def test_a_socket_outlives_its_loop(address: str) -> None:
    """An engine can be stopped after the loop has ended."""
    sockets: list[zmq.asyncio.Socket] = []

    async def read() -> None:
        sockets.append(receiving(address))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sockets[0].recv_multipart(copy=False), 0.01)

    asyncio.run(read())
    close(sockets[0])


def test_what_nobody_reads_leaves_the_loop_at_rest(
    run: Run, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the last word of an engine that dies, until another is there."""
    wakes, wake = 0, Receiver._wake

    def counted(receiver: Receiver) -> None:
        nonlocal wakes
        wakes += 1
        wake(receiver)

    async def read() -> None:
        nonlocal wakes
        with connected(address) as (socket, sender):
            sender.send(b"the last word")
            await asyncio.wait_for(socket.recv_multipart(copy=False), 20)
            wakes = 0
            sender.send(b"more")
            sender.close()
            async with asyncio.timeout(20):
                while not wakes:
                    await asyncio.sleep(0)
            for _ in range(1000):
                await asyncio.sleep(0)
            assert wakes < 10
            frames = await asyncio.wait_for(socket.recv_multipart(copy=False), 20)
            assert [frame.bytes for frame in frames] == [b"more"]

    monkeypatch.setattr(Receiver, "_wake", counted)
    run(read())

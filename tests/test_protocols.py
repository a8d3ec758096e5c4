"""How requests begin and answers are written, below the application."""

from __future__ import annotations

import asyncio
import contextvars
from urllib.parse import urlsplit

from gemma_serve.app import create_app
from gemma_serve.protocols.answer_transport import AnswerTransport
from gemma_serve.settings import Settings
from gemma_serve.turns import Turns

from .conftest import serving
from .fake_engine import FakeEngine

_whose = contextvars.ContextVar("whose", default="nobody's")


class Wire:
    """A transport that keeps each write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def answer_on(wire: Wire) -> AnswerTransport:
    return AnswerTransport(wire, asyncio.get_running_loop(), wire.close)  # type: ignore[arg-type]


async def test_requests_that_come_together_begin_some_at_a_time_and_in_order() -> None:
    starts, begun = Turns(), list[int]()
    for number in range(20):
        starts.take(lambda number=number: begun.append(number))  # type: ignore[misc]
    assert begun == list(range(8))
    await asyncio.sleep(0)
    assert begun == list(range(16))
    starts.take(lambda: begun.append(20))  # behind those who wait
    await asyncio.sleep(0)
    assert begun == list(range(21))
    await asyncio.sleep(0)
    starts.take(lambda: begun.append(21))
    assert begun[-1] == 21


async def test_who_waits_to_begin_does_not_inherit_from_who_has_begun() -> None:
    starts, seen = Turns(), list[str]()
    _whose.set("the first's")
    for _ in range(12):
        starts.take(lambda: seen.append(_whose.get()))
    await asyncio.sleep(0)
    assert seen[8:] == ["nobody's"] * 4


async def test_a_head_reaches_a_client_that_sends_no_more() -> None:
    async with serving(create_app(Settings(), FakeEngine())) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
        writer.write(b"HEAD /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.endswith(b"\r\n\r\n")


async def test_a_head_for_who_has_left_is_dropped() -> None:
    transport = answer_on(wire := Wire())
    transport.write(b"head ")
    wire.close()
    await asyncio.sleep(0)
    assert wire.writes == []


async def test_an_answers_head_goes_out_with_its_body() -> None:
    transport = answer_on(wire := Wire())
    transport.write(b"head ")
    transport.write(b"body")
    transport.write(b" more")
    await asyncio.sleep(0)
    assert wire.writes == [b"head body", b" more"]


async def test_a_head_does_not_wait_for_a_body_that_takes_its_time() -> None:
    transport = answer_on(wire := Wire())
    transport.write(b"head ")
    await asyncio.sleep(0)
    assert wire.writes == [b"head "]
    transport.write(b"body")
    assert wire.writes == [b"head ", b"body"]


async def test_a_head_without_a_body_is_written_before_the_end() -> None:
    transport = answer_on(wire := Wire())
    transport.write(b"head")
    transport.close()
    await asyncio.sleep(0)
    assert wire.writes == [b"head"] and wire.closed and transport.is_closing()


async def test_a_client_that_waits_to_send_its_body_is_told_at_once() -> None:
    transport = answer_on(wire := Wire())
    transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert len(wire.writes) == 1
    transport.write(b"head ")
    transport.write(b"body")
    assert wire.writes[1:] == [b"head body"]

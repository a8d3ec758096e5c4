"""How plain streams are written from the output loop; that they are, every stream of the live tests shows."""

from __future__ import annotations

import asyncio

import pytest

from gemma_serve.engine.base import Delta, Usage
from gemma_serve.engine.direct import DirectOutput, Flushes, Piece


class Sink:
    """Keeps what is written; `open` says whether that needs no waiting."""

    def __init__(self) -> None:
        self.open = True
        self.kept: list[str] = []
        self.writes: list[str] = []

    def put(self, delta: Delta) -> None:
        if delta.text == "fail":
            raise ValueError("cannot be rendered")
        self.kept.append(delta.text)

    def flush(self) -> bool:
        if self.open:
            self._write()
        return self.open

    async def drain(self) -> None:
        await asyncio.sleep(0)
        self._write()

    def _write(self) -> None:
        if self.kept:
            self.writes.append("".join(self.kept))
            self.kept.clear()


def piece(text: str, reason: str | None = None) -> Piece:
    return Piece(text, 1, reason, None)


async def test_each_step_is_written_at_once_while_there_is_time() -> None:
    sink, usage, flushes = Sink(), Usage(), Flushes()
    output = DirectOutput(sink, usage, flushes)
    running = asyncio.create_task(output.run())
    for text in ("a", "b"):
        output.put(piece(text))
        flushes.after_step()
    assert sink.writes == ["a", "b"]
    output.put(piece("c", "stop"))
    await running
    assert sink.writes == ["a", "b", "c"]
    assert usage.completion_tokens == 3


async def test_tokens_are_kept_while_the_loop_is_busy_but_not_for_long() -> None:
    sink, flushes = Sink(), Flushes()
    flushes.longest = 0.05
    output = DirectOutput(sink, Usage(), flushes)
    end = asyncio.get_running_loop().time() + 0.3
    while asyncio.get_running_loop().time() < end:  # never waits for the engine
        flushes.after_step()
        flushes.before_step()
    for text in ("a", "b"):
        output.put(piece(text))
        flushes.after_step()
    assert sink.writes == []
    async with asyncio.timeout(5):
        while not sink.writes:
            await asyncio.sleep(0.001)
    assert sink.writes == ["ab"]


async def test_a_client_that_does_not_read_gets_it_later_and_in_order() -> None:
    sink, flushes = Sink(), Flushes()
    output = DirectOutput(sink, Usage(), flushes)
    running = asyncio.create_task(output.run())
    sink.open = False
    output.put(piece("a"))
    flushes.after_step()
    output.put(piece("b"))
    output.put(piece("", "length"))
    await running
    assert "".join(sink.writes) == "ab"


@pytest.mark.parametrize("fault", [piece("fail"), RuntimeError("the engine is gone")])
async def test_a_failure_is_this_streams_alone(fault: Piece | Exception) -> None:
    sink, flushes = Sink(), Flushes()
    output = DirectOutput(sink, Usage(), flushes)
    output.put(piece("a"))
    output.put(fault)
    with pytest.raises((ValueError, RuntimeError)):
        await output.run()
    assert sink.writes == ["a"]  # what came before is not lost

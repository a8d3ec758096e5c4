"""What idle WebSockets cost: memory of each, and CPU per token of the chats beside them.

    python -m benchmarks.idle_connections [--idle 2000] [--active 50] [--seconds 30] [--rounds 3]

Starts the server with the embedded model. In each round the active clients chat without the idle ones and
then with them; the CPU is that of the server's process, without the engine's. Memory is what its resident
set grows by while the idle ones connect for the first time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import statistics
import time
from collections.abc import AsyncIterator

import psutil
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.server import end_on_signals, running_demo

TOKENS = 128
AT_ONCE = 50


async def joined(url: str) -> ClientConnection:
    socket = await connect(url, compression=None, ping_interval=None, open_timeout=60, max_queue=1)
    await socket.recv()
    return socket


@contextlib.asynccontextmanager
async def idle_clients(url: str, number: int) -> AsyncIterator[None]:
    sockets: list[ClientConnection] = []
    for start in range(0, number, AT_ONCE):
        batch = range(start, min(start + AT_ONCE, number))
        sockets += await asyncio.gather(*(joined(url) for _ in batch))
    try:
        yield
    finally:
        await asyncio.gather(*(socket.close() for socket in sockets))


async def chat(url: str, deadline: float) -> int:
    """Ask again and again. Returns how many tokens came."""
    tokens = 0
    async with await joined(url) as socket:
        while time.monotonic() < deadline:
            data = {"message": "Tell me a story.", "max_tokens": TOKENS, "min_p": 0.0, "keep": 0}
            await socket.send(json.dumps({"type": "chat", "data": data}))
            while (reply := json.loads(await socket.recv()))["type"] == "token":
                pass
            if reply["type"] != "message":
                raise SystemExit(f"the server answered {reply}")
            tokens += reply["data"]["usage"]["completion_tokens"]
    return tokens


async def cpu_per_token(url: str, server: psutil.Process, active: int, seconds: float) -> tuple[float, float]:
    """(microseconds of the server's CPU per token, tokens per second)."""
    started, before = time.monotonic(), sum(server.cpu_times()[:2])
    tokens = sum(await asyncio.gather(*(chat(url, started + seconds) for _ in range(active))))
    used = sum(server.cpu_times()[:2]) - before
    return used / tokens * 1e6, tokens / (time.monotonic() - started)


async def measure(url: str, server: psutil.Process, options: argparse.Namespace) -> None:
    await cpu_per_token(url, server, options.active, 5)
    alone, beside, memory = [], [], []
    for _ in range(options.rounds):
        alone.append(await cpu_per_token(url, server, options.active, options.seconds))
        before = server.memory_info().rss
        async with idle_clients(url, options.idle):
            memory.append((server.memory_info().rss - before) / options.idle / 1024)
            beside.append(await cpu_per_token(url, server, options.active, options.seconds))
    print(f"{options.idle} idle and {options.active} active WebSockets, {options.rounds} rounds")
    for name, rows in (("without the idle ones", alone), ("with them", beside)):
        cost, rate = (statistics.median(column) for column in zip(*rows, strict=True))
        spread = f"{min(row[0] for row in rows):.0f} to {max(row[0] for row in rows):.0f}"
        print(f"  {name:<22} {cost:6.1f} µs CPU per token ({spread}), {rate:,.0f} tokens/s")
    ratios = [after[0] / first[0] for first, after in zip(alone, beside, strict=True)]
    print(f"  ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"  memory {memory[0]:.1f} KB per idle connection")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--idle", type=int, default=2000)
    parser.add_argument("--active", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65_536), most))
    end_on_signals("ended")
    with running_demo("chat.max_connections_per_client=0", "log.level=WARNING") as server:
        url = server.url.replace("http", "ws", 1) + "/ws"
        asyncio.run(measure(url, psutil.Process(server.process.pid), options))


if __name__ == "__main__":
    main()

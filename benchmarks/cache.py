"""What does the response cache save, and what does it cost?

    python benchmarks/cache.py [--seconds 10] [--connections 32]

Serves an engine that answers at once, in a process of its own, with keys, limits and JSON logs on. wrk asks
one question again and again, whole and streamed: hits a second, their p99 and CPU time. First as fast as it
can, so that p99 is how long the connections wait for each other; then with pauses that leave about 2,000 a
second. libuv takes one new connection a round, so in short runs p99 is that of the first requests. Then
every request is another question, with the cache on and off in turn, a second each, in one process: a busy
machine slows both, and nothing else differs. CPU time of the server a request. At last 256 equal questions
are asked at once. Needs wrk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the tests' engine

KEY = "sk-benchmark-0123456789abcdef"
BODY = {"messages": [{"role": "user", "content": "What are your opening hours?"}], "temperature": 0}
ROUNDS, TURNS = 3, 24

_WRK = """
local n = 0
local numbered = %s
wrk.method = "POST"
wrk.headers["Authorization"] = "Bearer %s"
wrk.headers["Content-Type"] = "application/json"
if %d > 0 then delay = function() return math.random(0, %d) end end
request = function()
  n = n + 1
  return wrk.format(nil, nil, nil, (%s):gsub("opening hours", numbered and ("number " .. n) or "%%0"))
end
done = function(summary, latency, requests)
  io.write(string.format("result %%d %%d %%d %%d\\n", summary.requests, summary.duration,
    latency:percentile(99), summary.errors.status + summary.errors.read + summary.errors.timeout))
end
"""


async def serve(words: int) -> None:
    """In the process that is measured: with the cache, and without it."""
    from gemma_serve import logs
    from gemma_serve.app import create_app
    from gemma_serve.garbage import search_seldom
    from gemma_serve.settings import Settings
    from tests.conftest import serving
    from tests.fake_engine import FakeEngine

    logs.configure("INFO", "json")
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, ended.set)
    engine = FakeEngine(tuple(f" word{number}" for number in range(words)))
    async with contextlib.AsyncExitStack() as servers:
        urls = []
        for cached in (True, False):
            settings = Settings(
                model={"name": "gemma-demo"},
                security={
                    "api_keys": KEY,
                    "rate_limit_per_minute": 1_000_000_000,
                    "tokens_per_minute": 1_000_000_000,
                    "max_in_flight": 100_000,
                },
                cache={"enabled": cached},
            )
            urls.append(await servers.enter_async_context(serving(create_app(settings, engine))))
        search_seldom()  # as the server does once its engine is ready
        print(*urls, flush=True)
        await ended.wait()
    print(f"generations {len(engine.requests)}", flush=True)


class Server:
    def __init__(self, process: subprocess.Popen[str], url: str, without: str) -> None:
        self.process, self.url, self.without = process, url, without

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def end(self) -> int:
        """How many generations there were."""
        self.process.send_signal(signal.SIGUSR1)
        rest, _ = self.process.communicate(timeout=60)
        return int(re.findall(r"generations (\d+)", rest)[0])


@contextlib.contextmanager
def server(words: int) -> Iterator[Server]:
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", "--words", str(words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield Server(process, *process.stdout.readline().split())
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wrk(
    url: str, body: dict[str, Any], seconds: float, connections: int, numbered: bool, pause: int = 0
) -> dict[str, float]:
    """`pause`: the longest before a connection's next request, in ms; the shortest is none."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_WRK % (str(numbered).lower(), KEY, pause, pause, json.dumps(json.dumps(body))))
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", script.name]
        run = subprocess.run([*command, f"{url}/v1/chat/completions"], capture_output=True, text=True)
    requests, micros, p99, errors = map(int, re.findall(r"result (.*)", run.stdout)[0].split())
    assert not errors, run.stdout
    return {
        "requests": requests,
        "requests_per_second": round(requests / micros * 1e6),
        "p99_ms": p99 / 1000,
    }


def measure_hits(seconds: int, connections: int, words: int) -> None:
    with server(words) as running:
        for stream in (False, True):
            # A question of its own: the answer is to come as it was kept.
            body = BODY | {"stream": stream, "max_tokens": 1000 + stream}
            wrk(running.url, body, 1, connections, False)  # fills
            for pause in (*[0] * ROUNDS, round(0.7 * connections)):  # ms, so 11 on average with 32
                before = running.cpu_seconds()
                result = wrk(running.url, body, seconds, connections, False, pause)
                cost = (running.cpu_seconds() - before) / result["requests"] * 1e6
                row = {"measured": "hits", "stream": stream, "pause_ms": pause, "cpu_us": round(cost)}
                print(json.dumps(row | result), flush=True)
        print(json.dumps({"measured": "hits", "generations": running.end()}))


def measure_misses(words: int) -> None:
    for stream in (False, True):
        costs: dict[bool, list[float]] = {True: [], False: []}
        with server(words) as running:
            for turn in range(TURNS + 1):
                for cached in (turn % 2 == 0, turn % 2 == 1):
                    before = running.cpu_seconds()
                    # Another body each turn: else its questions would be known.
                    body = BODY | {"stream": stream, "max_tokens": 100 + turn}
                    result = wrk(running.url if cached else running.without, body, 1, 1, True)
                    if turn:  # the first warms up
                        cost = (running.cpu_seconds() - before) / result["requests"] * 1e6
                        costs[cached].append(cost)
        more = [one - other for one, other in zip(costs[True], costs[False], strict=True)]
        row: dict[str, Any] = {"measured": "misses", "stream": stream}
        row |= {f"cpu_us_{name}": round(statistics.median(costs[name == "on"]), 1) for name in ("on", "off")}
        quartiles = [round(value, 1) for value in statistics.quantiles(more, n=4)]
        print(json.dumps(row | {"quartiles_of_the_difference_us": quartiles}), flush=True)


async def stampede(words: int) -> None:
    with server(words) as running:
        async with clients(running.url) as http:
            answers = await asyncio.gather(
                *(http.post("/v1/chat/completions", json=BODY | {"stream": n % 2 == 0}) for n in range(256))
            )
        kinds = [answer.headers["x-cache"] for answer in answers]
        assert all(answer.status_code == 200 for answer in answers)
        counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        print(json.dumps({"measured": "256 at once", "generations": running.end()} | counts))


@contextlib.asynccontextmanager
async def clients(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=256)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=60) as http:
        yield http


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=10, help="length of each measurement of hits")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--words", type=int, default=32, help="of an answer; each is a delta")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve(options.words))  # as `gemma-server serve` does
        return
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing: apt-get install wrk")
    measure_hits(options.seconds, options.connections, options.words)
    measure_misses(options.words)
    asyncio.run(stampede(options.words))


if __name__ == "__main__":
    main()

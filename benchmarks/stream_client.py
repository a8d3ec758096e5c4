"""Many chats at once, read as cheaply as Python can, so that the server is what is measured.

    python benchmarks/stream_client.py http://127.0.0.1:8000 --clients 64 --requests 512 --tokens 64

Each client asks, reads its answer to the end and asks again on the same connection. Prints JSON: times in
seconds; `tokens` are those asked for, as every answer has `max_tokens` of them; inter-token times are a
request's mean. With --spread the answers' lengths differ, so that they do not all end together. With
--prompt-tokens the prompts are random token ids, exactly so many and the same for the same --seed, sent to
/v1/completions; --shared-tokens of them are the same in every prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import resource
import statistics
import time
from typing import cast
from urllib.parse import urlsplit

import uvloop

_FIRST_WORD = 300


class Client(asyncio.Protocol):
    """One connection; asks again until there is nothing left to ask."""

    _transport: asyncio.Transport

    def __init__(self, load: Load) -> None:
        self._load = load
        self._reset()

    def _reset(self) -> None:
        self._answered = False
        self._first: float | None = None
        self._tail = self._buffer = b""
        self._complete = False
        self._started = time.perf_counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no class of asyncio
        self._ask()

    def data_received(self, data: bytes) -> None:
        load, now = self._load, time.perf_counter()
        if not self._answered:
            self._answered = True
            if not data.startswith(b"HTTP/1.1 200"):
                load.failed(data)
                self._transport.close()
                return
        if self._first is None:
            if load.stream and b"\ndata:" not in data:
                return  # only the head
            self._first = now
        piece = self._tail + data
        self._complete = self._complete or b'"length"' in piece  # or it ended early, with an error
        self._tail = piece[-16:]
        if not self._tail.endswith(b"0\r\n\r\n") if load.stream else not self._whole(data):
            return
        if not self._complete:
            load.failed(piece)
            self._transport.close()
            return
        load.ended(self._started, self._first, now, self._tokens)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.lost()

    def _ask(self) -> None:
        question = self._load.next_question()
        if question is None:
            self._transport.close()
            return
        body, self._tokens = question
        self._reset()
        self._transport.write(self._load.head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def _whole(self, data: bytes) -> bool:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return False
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        return len(body) >= length


class Load:
    def __init__(self, options: argparse.Namespace) -> None:
        self.stream: bool = not options.whole
        parts = urlsplit(options.url)
        route = "completions" if options.prompt_tokens else "chat/completions"
        lines = [
            f"POST /v1/{route} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
        ]
        if options.key:
            lines.append(f"Authorization: Bearer {options.key}")
        self.head = ("\r\n".join(lines) + "\r\n").encode()
        self._left = options.requests
        self._options = options
        self._random = random.Random(options.seed)
        self._shared = self._words(options.shared_tokens)
        self._good = 0
        self._first: list[float] = []
        self._gaps: list[float] = []
        self._tokens = 0
        self._errors: list[str] = []
        self._ended = asyncio.Event()
        self._open = options.clients

    def next_question(self) -> tuple[bytes, int] | None:
        """Its body, and how many tokens it asks for."""
        if self._left <= 0:
            return None
        self._left -= 1
        tokens: int = self._options.tokens
        if self._options.spread:
            tokens = self._random.randint(max(1, tokens // 2), tokens + tokens // 2)
        own = self._options.prompt_tokens - len(self._shared)
        prompt: dict[str, object] = (
            {"prompt": self._shared + self._words(own)}
            if self._options.prompt_tokens
            else {"messages": [{"role": "user", "content": f"Tell me story {self._left}"}]}
        )
        body = json.dumps(
            prompt
            | {
                "model": self._options.model,
                "max_tokens": tokens,
                "temperature": 1.0,
                "ignore_eos": True,
                "stream": self.stream,
            }
        )
        return body.encode(), tokens

    def _words(self, number: int) -> list[int]:
        """Token ids that are no special ones and no single bytes."""
        return self._random.choices(range(_FIRST_WORD, self._options.vocabulary), k=number)

    def ended(self, started: float, first: float, now: float, tokens: int) -> None:
        self._first.append(first - started)
        self._tokens += tokens
        gap = (now - first) / max(1, tokens - 1)
        if tokens > 1:
            self._gaps.append(gap)
        slow_start = 1e3 * (first - started) > self._options.slo_ttft_ms
        self._good += not (slow_start or 1e3 * gap > self._options.slo_inter_token_ms)

    def failed(self, data: bytes) -> None:
        self._errors.append(data[:500].decode(errors="replace"))

    def lost(self) -> None:
        self._open -= 1
        if not self._open:
            self._ended.set()

    async def run(self) -> dict[str, object]:
        parts = urlsplit(self._options.url)
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        connections = (
            loop.create_connection(lambda: Client(self), parts.hostname, parts.port)
            for _ in range(self._options.clients)
        )
        await asyncio.gather(*connections)
        await self._ended.wait()
        seconds = time.perf_counter() - started
        done = len(self._first)
        return {
            "requests": done,
            "errors": self._options.requests - done,
            "first_error": next(iter(self._errors), None),
            "seconds": seconds,
            "tokens": self._tokens,
            "good_requests": self._good,
            "tokens_per_second": self._tokens / seconds,
            "ttft": percentiles(self._first),
            "inter_token": percentiles(self._gaps),
            "client_cpu_seconds": time.process_time(),
        }


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"p50": values[0], "p95": values[0], "p99": values[0]} if values else {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=64, help="at the same time")
    parser.add_argument("--requests", type=int, default=512, help="in all")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--spread", action="store_true", help="half to one and a half times as many")
    parser.add_argument("--model", default="gemma-demo")
    parser.add_argument("--key", help="API key")
    parser.add_argument("--prompt-tokens", type=int, default=0, help="of each prompt; 0 asks for a story")
    parser.add_argument("--shared-tokens", type=int, default=0, help="of each prompt, the same in all")
    parser.add_argument("--vocabulary", type=int, default=3072, help="ids below this are sent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slo-ttft-ms", type=float, default=math.inf, help="a good request's, at most")
    parser.add_argument("--slo-inter-token-ms", type=float, default=math.inf, help="likewise")
    parser.add_argument("--whole", action="store_true", help="ask for answers in one piece")
    options = parser.parse_args()
    # Each client is a connection, and the limit of a login shell is 1,024.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, 65536)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    async def run() -> dict[str, object]:
        return await Load(options).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(run())))


if __name__ == "__main__":
    main()

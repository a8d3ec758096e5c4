"""Does overload cost throughput? Completed tokens per second at 1 and at 4 times the engine's capacity.

    python -m benchmarks.goodput [--capacity 16] [--seconds 30]

Starts the server with the embedded model and `max_num_seqs` = capacity, then runs as many clients as the
engine takes at once, and four times as many, in turn, A B A B. Every client asks, reads its stream to the end
and asks again. Prints completed tokens/s, the time to first token, and how many were refused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time

import httpx

from benchmarks.server import end_on_signals, running_demo

TOKENS = 64


class Measurement:
    """What many clients got in a while; times in seconds."""

    def __init__(self, url: str, clients: int, seconds: float) -> None:
        self._url, self._clients, self._seconds = url, clients, seconds
        self._tokens = self._refused = 0
        self._first: list[float] = []

    async def run(self) -> dict[str, float]:
        self._end = time.perf_counter() + self._seconds
        await asyncio.gather(*map(self._client, range(self._clients)))
        cuts = statistics.quantiles(self._first, n=20)
        return {
            "clients": self._clients,
            "tokens_per_second": round(self._tokens / self._seconds, 1),
            "ttft_p50_seconds": round(cuts[9], 3),
            "ttft_p95_seconds": round(cuts[18], 3),
            "refused": self._refused,
        }

    async def _client(self, number: int) -> None:
        body = {
            "messages": [{"role": "user", "content": f"Tell me story {number}"}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
        async with httpx.AsyncClient(base_url=self._url, timeout=300) as http:
            while (started := time.perf_counter()) < self._end:
                async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                    if answer.status_code != 200:
                        self._refused += 1
                        await asyncio.sleep(int(answer.headers.get("retry-after", "1")))
                        continue
                    waiting = True
                    async for line in answer.aiter_lines():
                        if waiting and line.startswith("data: "):
                            waiting = False
                            self._first.append(time.perf_counter() - started)
                if time.perf_counter() < self._end:
                    self._tokens += TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capacity", type=int, default=16, help="sequences that the engine takes at once")
    parser.add_argument("--seconds", type=float, default=30, help="length of each of the four measurements")
    options = parser.parse_args()
    rows: list[dict[str, float]] = []
    end_on_signals("ended")
    with running_demo(f"engine.max_num_seqs={options.capacity}") as server:
        asyncio.run(Measurement(server.url, options.capacity, 5).run())  # warm
        for clients in (options.capacity, 4 * options.capacity) * 2:
            rows.append(asyncio.run(Measurement(server.url, clients, options.seconds).run()))
            print(json.dumps(rows[-1]), flush=True)
    once, fourfold = (
        sum(row["tokens_per_second"] for row in rows if row["clients"] == clients)
        for clients in (options.capacity, 4 * options.capacity)
    )
    print(f"goodput at 4 times the load: {fourfold / once:.2f} of that at 1 time")


if __name__ == "__main__":
    main()

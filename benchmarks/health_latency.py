"""How long does `/health/ready` take while many streams run? Asked for: 5 ms at most, for 99 of 100 probes.

    python -m benchmarks.health_latency [--streams 256] [--seconds 60] [--null] [--lockstep]

Starts the server with the embedded model (`--null`: with random tokens at once, so that the front end has all
the work that it can do), keeps that many streams running from another process, and probes as Kubernetes does:
on a new connection each time. Answers have 128 to 384 tokens; with --lockstep all have 256, so that all
end at once, every 25 s, and as many begin. Prints JSON: milliseconds, and how often it was not ready.

Where cores are short, a probe also waits for one. So each is followed by the same probe of `control`, a bare
responder in a process of its own that has nothing else to do: what that takes is the machine's share.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.server import end_on_signals, running_demo

NULL = "engine.distributed_executor_backend=benchmarks.null_executor.NullExecutor"
TOKENS, ENOUGH = 256, 10_000_000


@contextmanager
def streams(url: str, count: int, *more: str) -> Iterator[None]:
    """`count` of them at any time, once all have begun."""
    client = Path(__file__).with_name("stream_client.py")
    options = ["--clients", str(count), "--requests", str(ENOUGH), "--tokens", str(TOKENS), *more]
    process = subprocess.Popen([sys.executable, str(client), url, *options], stdout=subprocess.DEVNULL)
    try:
        while metrics(url)["running"] < count:
            if process.poll() is not None:
                raise SystemExit("the streams have ended")
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


RESPONDER = """
import asyncio, uvloop

class Responder(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        if data.endswith(b"\\r\\n\\r\\n"):
            self.transport.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}")

async def serve():
    server = await asyncio.get_running_loop().create_server(Responder, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

uvloop.run(serve())
"""


@contextmanager
def responder() -> Iterator[str]:
    """The URL of the control."""
    process = subprocess.Popen([sys.executable, "-c", RESPONDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def metrics(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/health/metrics", timeout=30) as answer:
        return dict(json.load(answer))


def probe(url: str) -> tuple[float, int]:
    """Milliseconds from the connection to the whole answer, and its status."""
    host = urlsplit(url)
    started = time.perf_counter()
    connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=30)
    connection.request("GET", "/health/ready")
    answer = connection.getresponse()
    answer.read()
    taken = time.perf_counter() - started
    connection.close()
    return taken * 1000, answer.status


def measure(url: str, control: str, seconds: float, per_second: float) -> dict[str, Any]:
    end, ours, bare, not_ready = time.perf_counter() + seconds, [], [], 0
    while time.perf_counter() < end:
        taken, status = probe(url)
        ours.append(taken)
        not_ready += status != 200
        bare.append(probe(control)[0])
        time.sleep(1 / per_second)
    return {"probes": len(ours), "not_ready": not_ready, **percentiles(ours), "control": percentiles(bare)}


def percentiles(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    found = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(times)}
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--per-second", type=float, default=20, help="probes")
    parser.add_argument("--null", action="store_true", help="random tokens in place of a model")
    parser.add_argument("--lockstep", action="store_true", help="answers that end together")
    options = parser.parse_args()
    settings = [f"engine.max_num_seqs={options.streams}", *([NULL] if options.null else [])]
    end_on_signals("ended")
    with running_demo(*settings) as server, responder() as control:
        url = server.url
        idle = measure(url, control, min(10, options.seconds), options.per_second)
        with streams(url, options.streams, *([] if options.lockstep else ["--spread"])):
            busy = measure(url, control, options.seconds, options.per_second)
            rate = metrics(url)["tokens_per_second"]["10s"]
    print(json.dumps({"idle": idle, "streams": options.streams, "tokens_per_second": rate, "busy": busy}))


if __name__ == "__main__":
    main()

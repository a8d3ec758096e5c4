"""What keys, limits, metrics and the log cost per request: CPU of this process on a route that does nothing.

    python benchmarks/request_cost.py [--requests 20000] [--rounds 7]

The application is called as a server would call it, without a network, so nothing else is in the figures.
Each round measures every variant in turn; the table gives the median and the spread over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI
from starlette.responses import Response

from gemma_serve import logs
from gemma_serve.api_keys import digest_of
from gemma_serve.app import create_app
from gemma_serve.engine.base import EngineStatus
from gemma_serve.middleware.api_keys import Authentication
from gemma_serve.middleware.metrics import RequestMetrics
from gemma_serve.middleware.rate_limit import RateLimit
from gemma_serve.middleware.request_log import RequestLog
from gemma_serve.settings import Settings

Message = MutableMapping[str, Any]
_HEADERS = [
    (b"host", b"localhost:8000"),
    (b"accept", b"application/json"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"connection", b"keep-alive"),
    (b"user-agent", b"OpenAI/Python 2.0.0"),
    (b"content-type", b"application/json"),
    (b"x-stainless-lang", b"python"),
    (b"content-length", b"2"),
]


class NoEngine:
    """There is nothing to run."""

    def __init__(self) -> None:
        self.status = EngineStatus()

    def capacity(self) -> int:
        return 256


def add_noop(app: FastAPI) -> FastAPI:
    @app.post("/v1/noop")
    async def noop() -> Response:
        return Response(b"{}", media_type="application/json")

    return app


def key(number: int) -> str:
    return f"sk-benchmark-{number:08d}-0123456789"


def served(folder: Path, keys: int, **security: Any) -> FastAPI:
    """The whole application, with a file of that many keys."""
    if keys:
        path = folder / f"keys-{keys}.yaml"
        entries = [{"name": f"key-{n}", "sha256": digest_of(key(n)).hex()} for n in range(keys)]
        path.write_text(yaml.safe_dump({"keys": entries}))
        security["api_keys_file"] = path
    settings = Settings(model={"name": "gemma-demo"}, security=security)
    return add_noop(create_app(settings, NoEngine()))  # type: ignore[arg-type]


def bare(app: FastAPI) -> FastAPI:
    """Without anything around its routes."""
    app.user_middleware.clear()
    return app


ASKED: tuple[Any, ...] = (RequestLog, RequestMetrics, Authentication, RateLimit)


def only_asked(app: FastAPI) -> FastAPI:
    """With keys, limits, metrics and log, without CORS, trusted hosts and the like."""
    app.user_middleware[:] = [layer for layer in app.user_middleware if layer.cls in ASKED]
    return app


async def cost(app: Callable[..., Awaitable[None]], requests: int, keys: int) -> float:
    """CPU microseconds of one request; the keys take turns."""
    body = {"type": "http.request", "body": b"{}", "more_body": False}
    statuses: set[int] = set()

    async def receive() -> Message:
        return body

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.add(message["status"])

    tokens = [f"Bearer {key(number)}".encode() for number in range(max(1, keys))]
    started = time.process_time()
    for number in range(requests):
        headers = [*_HEADERS, (b"authorization", tokens[number % len(tokens)])]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/noop",
            "raw_path": b"/v1/noop",
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 50_000),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        await app(scope, receive, send)
    seconds = time.process_time() - started
    assert statuses == {200}, statuses
    return seconds / requests * 1e6


async def measure(requests: int, rounds: int) -> dict[str, list[float]]:
    logging.getLogger("gemma_serve").setLevel("INFO")
    limits: dict[str, Any] = {
        "rate_limit_per_minute": 1_000_000_000,
        "tokens_per_minute": 1_000_000_000,
        "tokens_per_day": 1_000_000_000,
        "max_in_flight": 1_000,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variants: dict[str, tuple[Any, int]] = {
            "the routes alone": (bare(served(folder, 0)), 0),
            "log, headers, body limit, …": (served(folder, 0), 0),
            "and keys (10)": (served(folder, 10), 10),
            "and all limits (memory)": (served(folder, 10, **limits), 10),
            "keys, limits, metrics, log alone": (only_asked(served(folder, 10, **limits)), 10),
            "all, 10,000 keys, 10 of them used": (served(folder, 10_000, **limits), 10),
            "all, 10,000 keys, all used": (served(folder, 10_000, **limits), 10_000),
        }
    results: dict[str, list[float]] = {name: [] for name in variants}
    for _, (app, keys) in variants.items():
        await cost(app, max(keys, 1000), keys)  # every key has been here, as in a server that runs for long
    for _ in range(rounds):
        for name, (app, keys) in variants.items():
            results[name].append(await cost(app, requests, keys))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000, help="of each variant in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    # The log is written as the server writes it, to a file that costs no terminal's time.
    terminal, log = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 2)
    logs.configure("INFO", "json")
    os.dup2(terminal, 2)
    results = asyncio.run(measure(options.requests, options.rounds))
    base = statistics.median(results["the routes alone"])
    print(f"{'CPU µs a request':<34} {'median':>8} {'least':>8} {'most':>8} {'more':>8}")
    for name, values in results.items():
        median = statistics.median(values)
        print(f"{name:<34} {median:8.1f} {min(values):8.1f} {max(values):8.1f} {median - base:8.1f}")
    if options.json:
        options.json.write_text(json.dumps({"python": sys.version, "us_per_request": results}, indent=2))


if __name__ == "__main__":
    main()

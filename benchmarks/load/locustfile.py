"""Users of a chat server, for Locust; any OpenAI-compatible URL. `make load-test` runs it; by hand:

    OPENAI_API_KEY=sk-... locust -f benchmarks/load/locustfile.py --headless -u 50 -r 10 -t 2m -H http://host:8000

Times to the first token are in the table as `TTFT`, beside the time of the whole answer. Locust ends with 1
when a threshold is not kept: --max-failure-share, --ttft-p95-ms.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import gevent
import websocket
from locust import HttpUser, User, between, events, task

KEY = os.environ.get("OPENAI_API_KEY", "")
MODEL = os.environ.get("LOAD_MODEL", "")
HEADERS = {"Authorization": f"Bearer {KEY}"} if KEY else {}
_FAQ = [f"What is the answer to frequent question number {number}?" for number in range(10)]
_numbers = itertools.count()


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    parser.add_argument("--max-failure-share", type=float, default=0.01, help="of all requests")
    parser.add_argument("--ttft-p95-ms", type=float, default=5000.0, help="over all users that stream")


@events.quitting.add_listener
def _judge(environment: Any, **_: Any) -> None:
    options, entries = environment.parsed_options, list(environment.stats.entries.values())
    waits = [entry for entry in entries if entry.method == "TTFT"]
    ended = sum(entry.num_requests for entry in entries if entry not in waits)
    share = sum(entry.num_failures for entry in entries) / max(1, ended)
    faults = [] if ended else ["no request ended"]
    if share > options.max_failure_share:
        faults.append(f"{share:.1%} of the requests failed, above {options.max_failure_share:.1%}")
    for entry in waits:
        if (p95 := entry.get_response_time_percentile(0.95)) and p95 > options.ttft_p95_ms:
            faults.append(f"{entry.name}: TTFT p95 {p95:g} ms, above {options.ttft_p95_ms:g} ms")
    for fault in faults:
        print(f"threshold not kept: {fault}")
    environment.process_exit_code = 1 if faults else 0


class Chatter(HttpUser):
    """What the users have in common."""

    abstract = True
    wait_time = between(0.5, 2)

    def ask(self, name: str, text: str, tokens: int, pause: float = 0, stop_after: int = 0) -> None:
        """Stream an answer; `pause` seconds between reads, gone after `stop_after` pieces of it."""
        body = _body([{"role": "user", "content": text}], tokens) | {"stream": True}
        started = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", name=name, json=body, headers=HEADERS, stream=True, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {(answer.text or '')[:200]}")
                return
            ended = False
            # requests itself counts until the first byte.
            for number, event in enumerate(_events(answer)):
                if not number:
                    self._report("TTFT", name, started, 0)
                if stop_after and number + 1 >= stop_after:
                    ended = True
                    break
                if event == "[DONE]":
                    ended = True
                elif '"error"' in event and "error" in json.loads(event):
                    answer.failure(event[:200])
                    return
                if pause:
                    gevent.sleep(pause)
            answer.request_meta["response_time"] = 1e3 * (time.perf_counter() - started)
            if ended:
                answer.success()
            else:
                answer.failure("the stream ended without [DONE]")

    def _report(self, kind: str, name: str, started: float, size: int) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=1e3 * (time.perf_counter() - started),
            response_length=size,
            exception=None,
            context={},
        )


class ShortChat(Chatter):
    """A question and a short answer."""

    weight = 10

    @task
    def chat(self) -> None:
        self.ask("short chat", f"Tell me story {next(_numbers)}.", 32)


class LongContext(Chatter):
    """Half the context is a document."""

    weight = 2

    @task
    def summarize(self) -> None:
        words = " ".join(random.choices(["river", "stone", "light", "engine", "paper", "winter"], k=400))
        self.ask("long context", f"{next(_numbers)} {words}\nSummarize this.", 64)


class StreamingReader(Chatter):
    """Reads as a person does, and sometimes leaves before the end."""

    weight = 3

    @task(3)
    def read(self) -> None:
        self.ask("streaming reader", f"Tell me a long story, number {next(_numbers)}.", 64, pause=0.05)

    @task
    def leave(self) -> None:
        self.ask("streaming reader leaves", f"Tell me story {next(_numbers)}.", 256, stop_after=5)


class FAQ(Chatter):
    """Asks what others have asked: for prefix and response caches."""

    weight = 4

    @task
    def ask_again(self) -> None:
        body = _body([{"role": "user", "content": random.choice(_FAQ)}], 32) | {"temperature": 0}
        self.client.post("/v1/chat/completions", name="FAQ", json=body, headers=HEADERS)


class Abuser(Chatter):
    """Sends what must be refused, with a status below 500. Not wrong keys: they would block this address."""

    weight = 1

    @task
    def broken_json(self) -> None:
        headers = {"Content-Type": "application/json"} | HEADERS
        self._refused("broken JSON", data=b'{"messages": [', headers=headers)

    @task
    def wrong_types(self) -> None:
        self._refused("wrong types", json={"messages": "hello", "max_tokens": "many"}, headers=HEADERS)

    @task
    def far_too_long(self) -> None:
        body = _body([{"role": "user", "content": "word " * 400_000}], 8)
        self._refused("2 MB prompt", json=body, headers=HEADERS)

    @task
    def no_such_model(self) -> None:
        body = _body([{"role": "user", "content": "Hi"}], 8) | {"model": "no-such-model"}
        self._refused("no such model", json=body, headers=HEADERS)

    def _refused(self, name: str, **request: Any) -> None:
        path = "/v1/chat/completions"
        with self.client.post(path, name=f"abuse: {name}", catch_response=True, **request) as answer:
            if 400 <= answer.status_code < 500:
                answer.success()
            else:
                answer.failure(f"{answer.status_code}, where 4xx is right")


class WebSocketChatter(User):
    """Keeps a session open and chats in it; for servers that have /ws."""

    weight = 3
    wait_time = between(0.5, 2)

    def on_start(self) -> None:
        url = "ws" + str(self.environment.host).rstrip("/").removeprefix("http") + "/ws"
        headers = [f"{name}: {value}" for name, value in HEADERS.items()]
        self._socket = websocket.create_connection(url, header=headers, timeout=300)
        self._socket.recv()  # `session`
        self._messages = 0

    def on_stop(self) -> None:
        self._socket.close()

    @task
    def chat(self) -> None:
        keep = min(4, self._messages)  # the first questions and answers, or the history would grow for ever
        data = {"message": f"Tell me story {next(_numbers)}.", "max_tokens": 32, "keep": keep}
        started, size, fault = time.perf_counter(), 0, None
        self._socket.send(json.dumps({"type": "chat", "data": data}))
        first = True
        while True:
            text = self._socket.recv()
            size += len(text)
            reply = json.loads(text)
            if first and reply["type"] == "token":
                first = False
                self._report("TTFT", started, size, None)
            if reply["type"] not in ("token", "trimmed"):
                if reply["type"] != "message":
                    fault = RuntimeError(text[:200])
                else:
                    self._messages = keep + 2
                break
        self._report("WS", started, size, fault)

    def _report(self, kind: str, started: float, size: int, fault: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name="WebSocket chat",
            response_time=1e3 * (time.perf_counter() - started),
            response_length=size,
            exception=fault,
            context={},
        )


def _body(messages: list[dict[str, str]], tokens: int) -> dict[str, Any]:
    return {"model": MODEL, "messages": messages, "max_tokens": tokens}


def _events(answer: Any) -> Iterator[str]:
    for line in answer.iter_lines(chunk_size=None):  # as it comes
        text = line.decode()
        if text.startswith("data: "):
            yield text.removeprefix("data: ")

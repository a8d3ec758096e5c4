"""A tour of a running gemma_serve with the `openai` and `websockets` packages; see `--help`.

To add a part: write a function that takes a `Tour`, prints with `say` and raises `Failed` (or lets the
client's exception out) when the server is wrong, and put it in `PARTS`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

try:
    import httpx
    import openai
    import websockets.sync.client
except ImportError as error:
    sys.exit(f"server_client: {error}. Run `pip install openai websockets`, or use .venv/bin/python.")
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam, ChatCompletionToolParam

_HELP = """\
Talks to a running gemma_serve as an application would, shows what is sent and what comes back, and checks
it. Needs nothing but the packages `openai` and `websockets`. Exit code: 0 when every part passed, 1 when one
failed or there is no server.
"""

_EXAMPLES = """\
examples:
  make serve                                    in another terminal: start a server
  python examples/server_client.py              tour of the server on this machine, port 8000
  python examples/server_client.py http://gpu-1:8000 --model gemma-3-4b-it --wait 900
"""

_CLIENTS = 8  # of the part `several_at_once`
_LABEL = 20  # columns


class Failed(Exception):
    """The server answered, but not as it should."""


class NoTour(Exception):
    """There is no server to tour, or no such model on it; `str()` is one sentence."""


@dataclass(frozen=True)
class Tour:
    """What every part needs."""

    url: str
    client: openai.OpenAI
    http: httpx.Client
    model: str

    def ask(self, text: str, max_tokens: int = 32) -> ChatCompletion:
        return self.client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": text}], max_tokens=max_tokens
        )


# --- the parts ------------------------------------------------------------------------------------


def health(tour: Tour) -> None:
    for path in ("/health/live", "/health/ready", "/health"):
        response = tour.http.get(path)
        say(f"GET {path}", f"{response.status_code} {response.text}")
        check(response.status_code == 200, f"{path} answered {response.status_code}")


def models(tour: Tour) -> None:
    for model in tour.client.models.list():
        length = (model.model_extra or {}).get("max_model_len")
        say(model.id, f"context of {length:,} tokens" if length else "")
    say("used here", tour.client.models.retrieve(tour.model).id)


def chat(tour: Tour) -> None:
    question = "Hello! Who are you?"
    say("you", question)
    show_answer(tour.ask(question))


def stream(tour: Tour) -> None:
    say("you", "Tell me a story.")
    started = time.perf_counter()
    chunks = tour.client.chat.completions.create(
        model=tour.model,
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_tokens=300,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, reason, tokens = 0.0, None, 0
    print(f"    {'model':<{_LABEL}} ", end="", flush=True)
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.delta.content:
                first = first or time.perf_counter() - started
                print(printable(choice.delta.content), end="", flush=True)
            reason = choice.finish_reason or reason
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    print()
    seconds = time.perf_counter() - started
    check(reason in ("stop", "length"), f"the stream ended with finish_reason {reason!r}")
    check(tokens > 0, "the stream ended without the token counts that were asked for")
    say("", f"first token after {first * 1000:.0f} ms, {tokens} tokens, {tokens / seconds:.0f} a second")


def conversation(tour: Tour) -> None:
    history: list[ChatCompletionMessageParam] = [{"role": "system", "content": "Answer in one sentence."}]
    prompt_tokens = 0
    for question in ("My name is Ada.", "What is my name?"):
        say("you", question)
        history.append({"role": "user", "content": question})
        answer = tour.client.chat.completions.create(model=tour.model, messages=history, max_tokens=32)
        usage = show_answer(answer)
        history.append({"role": "assistant", "content": answer.choices[0].message.content})
        check(usage.prompt_tokens > prompt_tokens, "the second prompt is not longer than the first")
        prompt_tokens = usage.prompt_tokens


def completion(tour: Tour) -> None:
    prompt = "Once upon a time"
    say("prompt", prompt)
    answer = tour.client.completions.create(model=tour.model, prompt=prompt, max_tokens=32)
    say("model", answer.choices[0].text)
    check(answer.choices[0].finish_reason in ("stop", "length"), "no finish_reason")


def json_answer(tour: Tour) -> None:
    question = "Invent a person: name and age, as JSON."
    say("you", question)
    answer = tour.client.chat.completions.create(
        model=tour.model,
        messages=[{"role": "user", "content": question}],
        max_tokens=512,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "person",
                "strict": True,
                "schema": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "maxLength": 30},
                        "age": {"type": "integer", "minimum": 0, "maximum": 120},
                    },
                    "required": ["name", "age"],
                    "additionalProperties": False,
                },
            },
        },
    )
    text = answer.choices[0].message.content or ""
    check(answer.choices[0].finish_reason == "stop", f"the JSON was cut off after 512 tokens: {text[:80]!r}")
    try:
        person = json.loads(text)
    except json.JSONDecodeError as error:
        raise Failed(f"not JSON ({error}): {text[:80]!r}") from error
    say("parsed", str(person))
    check(person.keys() == {"name", "age"}, "the JSON does not follow the schema")
    check(isinstance(person["age"], int), f"age is {person['age']!r}, not an integer")


def tool_call(tour: Tour) -> None:
    weather: ChatCompletionToolParam = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city now.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
    question: ChatCompletionMessageParam = {"role": "user", "content": "What is the weather in Paris?"}
    say("you", "What is the weather in Paris? (with the tool get_weather)")
    try:
        answer = tour.client.chat.completions.create(
            model=tour.model, messages=[question], tools=[weather], max_tokens=64
        )
    except openai.BadRequestError as error:
        # A server without a tool parser is right to refuse. Any other refusal is a fault.
        if "tool_parser" not in error.message:
            raise
        say("", "this server takes no tools; model.tool_parser turns them on")
        return
    message = answer.choices[0].message
    if not message.tool_calls:
        say("model", message.content or "")
        say("", "a text and no call: nothing obliges a model to call")
        return
    for call in message.tool_calls:
        check(call.type == "function", f"a tool call of type {call.type!r}")
        if call.type == "function":
            say("calls", f"{call.function.name}({call.function.arguments})")
            check(call.function.name == "get_weather", "a tool that was not offered")


def several_at_once(tour: Tour) -> None:
    def timed_chat(number: int) -> tuple[float, int]:
        started = time.perf_counter()
        answer = tour.ask(f"Count from {number} to {number + 10}.")
        return time.perf_counter() - started, answer.usage.completion_tokens if answer.usage else 0

    started = time.perf_counter()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        answers = list(pool.map(timed_chat, range(_CLIENTS)))
    elapsed = time.perf_counter() - started
    tokens = sum(count for _, count in answers)
    say("", f"{_CLIENTS} chats side by side: {tokens} tokens, {tokens / elapsed:.0f} a second")
    say("", f"they took {elapsed:.2f} s; their times add up to {sum(time for time, _ in answers):.2f} s")


def errors(tour: Tour) -> None:
    def ask(**changes: object) -> Callable[[], object]:
        body = {"model": tour.model, "messages": [{"role": "user", "content": "Hello"}]} | changes
        return lambda: tour.client.post("/chat/completions", body=without_none(body), cast_to=object)

    limit = (tour.client.models.retrieve(tour.model).model_extra or {}).get("max_model_len") or 131_072
    too_long = [{"role": "user", "content": "word " * (limit + 1)}]
    expect("an unknown model", 404, "model_not_found", ask(model="no-such-model"))
    expect("temperature 9", 400, "invalid_value", ask(temperature=9))
    expect("a misspelt parameter", 400, "unknown_parameter", ask(temprature=1))
    expect("no messages", 400, "missing_required_parameter", ask(messages=None))
    expect("too long a prompt", 400, "context_length_exceeded", ask(messages=too_long))
    expect("an unknown path", 404, None, lambda: tour.client.get("/no-such-path", cast_to=object))
    response = tour.http.post("/v1/chat/completions", content=b"{", headers=_JSON)
    say("broken JSON", f"{response.status_code} {response.json()['error']['message']}")
    check(response.status_code == 400, f"broken JSON got {response.status_code}, not 400")
    tour.ask("Are you still there?")
    say("after all these", "it still answers")


_JSON = {"Content-Type": "application/json"}


def without_none(body: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in body.items() if value is not None}


def request_id(tour: Tour) -> None:
    sent = f"tour-{uuid.uuid4().hex[:8]}"
    raw = tour.client.chat.completions.with_raw_response.create(
        model=tour.model,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=1,
        extra_headers={"X-Request-Id": sent},
    )
    received = raw.headers.get("x-request-id")
    say("sent", sent)
    say("received", f"{received}, in the answer's id too: {raw.parse().id}")
    check(received == sent, "the server did not return our X-Request-Id")


def websocket(tour: Tour) -> None:
    """The chat whose history the server keeps; README has its protocol."""
    address = f"ws{tour.url.removeprefix('http')}/ws"
    headers = {"Authorization": f"Bearer {tour.client.api_key}"}

    def ask(kind: str, **data: object) -> dict[str, Any]:
        """Print the tokens that come; return the message behind them."""
        socket.send(json.dumps({"type": kind, "id": "1", "data": data}))
        while True:
            reply: dict[str, Any] = json.loads(socket.recv(timeout=120))
            if reply["type"] == "error":
                raise Failed(reply["data"]["message"])
            if reply["type"] != "token":
                return reply
            print(printable(reply["data"].get("text", "")), end="", flush=True)

    with websockets.sync.client.connect(address, additional_headers=headers) as socket:
        session: str = json.loads(socket.recv(timeout=120))["session_id"]
        said = 0
        for question in ("My name is Ada.", "What is my name?"):
            say("you", question)
            print(f"    {'model':<{_LABEL}} ", end="", flush=True)
            answer = ask("chat", message=question, max_tokens=32, model=tour.model)["data"]
            print()
            check(answer["finish_reason"] in ("stop", "length"), "no finish_reason")
            said += 2 if answer["content"] else 0  # an empty answer is not remembered
    with websockets.sync.client.connect(address, additional_headers=headers) as socket:
        socket.recv(timeout=120)
        remembered = ask("session", session_id=session)["data"]["messages"]
        say("connected again", f"the session has {remembered} messages")
        check(remembered == said, f"the session has {remembered} messages, not {said}")


PARTS: tuple[Callable[[Tour], None], ...] = (
    health,
    models,
    chat,
    stream,
    conversation,
    completion,
    json_answer,
    tool_call,
    several_at_once,
    errors,
    request_id,
    websocket,
)


# --- what they print and check --------------------------------------------------------------------


def say(label: str, text: str) -> None:
    """A labelled line, wrapped to the terminal and cut when it is long."""
    width = min(shutil.get_terminal_size().columns, 120)
    text = textwrap.shorten(printable(text), 400, placeholder=" …")
    lines = textwrap.wrap(text, max(20, width - _LABEL - 5)) or [""]
    for position, line in enumerate(lines):
        print(f"    {'' if position else label:<{_LABEL}} {line}".rstrip())


def printable(text: str) -> str:
    """What a model writes may hold control characters, which would drive the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def show_answer(answer: ChatCompletion) -> CompletionUsage:
    choice, usage = answer.choices[0], answer.usage
    say("model", choice.message.content or "")
    check(choice.finish_reason in ("stop", "length"), f"finish_reason is {choice.finish_reason!r}")
    if usage is None or usage.completion_tokens < 1:
        raise Failed("the answer has no token counts")
    say("", f"{usage.prompt_tokens} tokens read, {usage.completion_tokens} written ({choice.finish_reason})")
    return usage


def check(right: bool, otherwise: str) -> None:
    if not right:
        raise Failed(otherwise)


def expect(what: str, status: int, code: str | None, call: Callable[[], object]) -> None:
    """`call` must fail with this status and code, as OpenAI's client reports them."""
    try:
        call()
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        say(what, f"{error.status_code} {error.code}: {body.get('message', error.message)}")
        check(
            (error.status_code, error.code) == (status, code),
            f"{what} got {error.status_code} {error.code}, not {status} {code}",
        )
        return
    raise Failed(f"{what} was accepted; {status} {code} would be right")


# --- running them ---------------------------------------------------------------------------------


def main() -> int:
    options = parse_options()
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="replace")  # type: ignore[union-attr]  # the tick, on an ASCII terminal
    url = options.url.rstrip("/").removesuffix("/v1")
    url = url if "://" in url else f"http://{url}"
    try:
        with (
            httpx.Client(base_url=url, timeout=60) as http,
            openai.OpenAI(base_url=f"{url}/v1", api_key=options.api_key, timeout=120) as client,
        ):
            wait_until_ready(http, url, options.wait)
            return run(Tour(url, client, http, choose_model(client, options.model)))
    except NoTour as error:
        print(f"server_client: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="server_client.py",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "url", metavar="URL", nargs="?", default="http://localhost:8000", help="default: %(default)s"
    )
    parser.add_argument("--model", help="the model to ask; by default the first that the server lists")
    parser.add_argument(
        "--api-key", default="unused", metavar="KEY", help="for a server that wants one; never printed"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=300,
        metavar="SECONDS",
        help="how long to wait for a server that still loads its model (default: %(default)s)",
    )
    return parser.parse_args()


def wait_until_ready(http: httpx.Client, url: str, seconds: float) -> None:
    """Return once the server can answer. Raises `NoTour`."""
    deadline = time.monotonic() + seconds
    shown = ""
    while True:
        try:
            response = http.get("/health/ready")
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise NoTour(
                f"there is no server at {url} ({error}). Start one with `make serve`, or name another URL."
            ) from error
        if response.status_code != 503:
            return  # ready, or a server of another kind: the first part will tell
        state = summary(response)
        if "loading" not in state:
            raise NoTour(f"the server at {url} cannot answer: {state}")
        if time.monotonic() > deadline:
            raise NoTour(f"the server at {url} is still {state} after {seconds:.0f} s; see --wait")
        if state != shown:
            print(f"waiting: {state}", flush=True)
            shown = state
        time.sleep(0.5)


def summary(response: httpx.Response) -> str:
    """`loading, importing vLLM` from what /health/ready says."""
    try:
        body = response.json()
        return ", ".join(str(body[key]) for key in ("status", "phase", "reason") if key in body)
    except (ValueError, TypeError):
        return f"{response.status_code} {response.text[:200]}"


def choose_model(client: openai.OpenAI, name: str | None) -> str:
    """`name` if the server has it, or the first model that it lists. Raises `NoTour`."""
    try:
        return name if name and client.models.retrieve(name) else client.models.list().data[0].id
    except (openai.OpenAIError, IndexError) as error:
        raise NoTour(f"no tour of {client.base_url}: {error}") from error


def run(tour: Tour) -> int:
    """Every part, also after one has failed. Returns the exit code."""
    started = time.perf_counter()
    print(f"{tour.url}, model {tour.model}")
    failed = [part.__name__ for part in PARTS if not passes(part, tour)]
    seconds = time.perf_counter() - started
    if failed:
        print(f"\n✗ {len(failed)} of {len(PARTS)} parts failed in {seconds:.1f} s: {', '.join(failed)}")
        return 1
    print(f"\n✓ all {len(PARTS)} parts passed in {seconds:.1f} s")
    return 0


def passes(part: Callable[[Tour], None], tour: Tour) -> bool:
    print(f"\n{part.__name__.replace('_', ' ')}", flush=True)
    started = time.perf_counter()
    try:
        part(tour)
    except (Failed, openai.OpenAIError, httpx.HTTPError, websockets.WebSocketException, OSError) as error:
        print(f"  ✗ {time.perf_counter() - started:.2f} s: {error}", flush=True)
        return False
    print(f"  ✓ {time.perf_counter() - started:.2f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())

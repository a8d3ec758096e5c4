"""Chat and completions through the real OpenAI client, on the real engine."""

from __future__ import annotations

import asyncio
import json
import random
import re
from typing import Any

import httpx
import openai
import pytest

from .conftest import ServerProcess

HELLO: Any = [{"role": "user", "content": "Hello!"}]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="gemma-demo", messages=HELLO, max_tokens=8, temperature=0)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == "gemma-demo"


def test_n_greedy_answers_are_equal_and_all_counted(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="gemma-demo",
        prompt=["Once", "Twice"],
        n=2,
        temperature=0,
        max_tokens=5,
        extra_body={"ignore_eos": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert texts[0] != texts[2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20


@pytest.mark.parametrize(("n", "temperature"), [(1, 0), (3, 1), (3, 0)])
def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI, n: int, temperature: float) -> None:
    request: dict[str, Any] = {
        "model": "gemma-demo",
        "messages": HELLO,
        "max_tokens": 24,
        "seed": 1,
        "n": n,
        "temperature": temperature,
    }
    whole = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    assert [chunk.choices[0].delta.role for chunk in chunks[:n]] == ["assistant"] * n
    for index in range(n):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert (
            "".join(choice.delta.content or "" for choice in choices) == whole.choices[index].message.content
        )
        assert [c.finish_reason for c in choices if c.finish_reason] == [whole.choices[index].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_is_sent_while_it_is_written(http: httpx.Client) -> None:
    body = {"messages": HELLO, "max_tokens": 64, "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        pieces = list(answer.iter_raw())
    assert len(pieces) > 10
    assert pieces[-1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_plain_text_and_json_lines(http: httpx.Client, path: str) -> None:
    body: dict[str, Any] = {"temperature": 0, "max_tokens": 16}
    body |= {"messages": HELLO} if "chat" in path else {"prompt": "Once"}
    choice = http.post(path, json=body).json()["choices"][0]
    whole = choice["message"]["content"] if "chat" in path else choice["text"]
    text = http.post(path, json=body, headers={"accept": "text/plain"})
    assert text.headers["content-type"] == "text/plain; charset=utf-8"
    assert text.text == whole
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    lines = http.post(path, json=body | usage, headers={"accept": "application/x-ndjson"})
    assert lines.headers["content-type"] == "application/x-ndjson"
    chunks = [json.loads(line) for line in lines.text.splitlines()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices) == whole
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    several = http.post(path, json=body | {"n": 2, "temperature": 1}, headers={"accept": "text/plain"})
    assert several.status_code == 400


def test_every_event_is_one_json_line(http: httpx.Client) -> None:
    body = {"messages": HELLO, "max_tokens": 16, "stream": True}
    text = http.post("/v1/chat/completions", json=body).text
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        assert chunk["object"] == "chat.completion.chunk"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    request: dict[str, Any] = {
        "model": "gemma-demo",
        "messages": HELLO,
        "max_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer: Any = client.chat.completions.create(**request, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert 1 <= len(tokens) <= 4
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)


def test_json_schema(client: openai.OpenAI) -> None:
    schema: dict[str, object] = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="gemma-demo",
        messages=[{"role": "user", "content": "Invent a person: name and age, as JSON."}],
        max_tokens=200,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content or "").keys() == {"name", "age"}


@pytest.mark.parametrize("name", ["gpt-4o-mini", "gemma-demo"])
def test_an_alias_answers_as_the_model_that_ran(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=2)
    assert answer.model == "gemma-demo"
    assert client.models.retrieve(name).id == "gemma-demo"


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("gemma-demo", "model")
    assert client.models.retrieve("gemma-demo") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_system_and_developer_messages_content_parts_and_tool_results(client: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        {"role": "user", "content": "So?"},
    ]
    answer = client.chat.completions.create(model="gemma-demo", messages=messages, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 20


def test_openai_parameters_without_effect_are_accepted(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="gemma-demo",
        messages=HELLO,
        max_tokens=2,
        user="u",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        modalities=["text"],
        prompt_cache_options={"mode": "explicit"},
        stream=True,
        stream_options={"include_obfuscation": False},
    )


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="gemma-demo", prompt=["Once", "Twice"], n=2, max_tokens=4, logprobs=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is not None for choice in answer.choices)
    echo = client.completions.create(model="gemma-demo", prompt="Once upon", echo=True, max_tokens=2)
    assert echo.choices[0].text.startswith("Once upon")
    ids = client.completions.create(model="gemma-demo", prompt=[2, 300, 301], max_tokens=2)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3


def test_completion_stream(http: httpx.Client, client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"prompt": ["Once", "Twice"], "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(model="gemma-demo", **request)
    events = http.post("/v1/completions", json=request | {"stream": True}).text.split("\n\n")[:-2]
    choices = [choice for event in events for choice in json.loads(event.removeprefix("data: "))["choices"]]
    for index in (0, 1):
        text = "".join(choice["text"] for choice in choices if choice["index"] == index)
        assert text == whole.choices[index].text


def test_stop_strings_are_not_part_of_the_answer(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "gemma-demo", "messages": HELLO, "max_tokens": 32, "temperature": 0}
    full = client.chat.completions.create(**request).choices[0].message.content or ""
    stop = re.split(r"\s+", full.strip())[2]
    answer = client.chat.completions.create(**request, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == full[: full.index(stop)]


@pytest.mark.slow
async def test_200_seeded_requests_of_mixed_length_at_64_at_a_time(live: ServerProcess) -> None:
    """A seed that shares a step with a chunked prefill would kill the engine on CPU."""
    draw = random.Random(0)
    limit = asyncio.Semaphore(64)
    async with httpx.AsyncClient(base_url=live.url, timeout=150) as client:

        async def one(seed: int) -> httpx.Response:
            prompt = "word " * draw.choice([1, 10, 100, 600])
            body = {
                "messages": [{"role": "user", "content": prompt}],
                "seed": seed,
                "max_tokens": draw.choice([1, 8, 32]),
                "stream": seed % 2 == 0,
            }
            async with limit:
                return await client.post("/v1/chat/completions", json=body)

        answers = await asyncio.gather(*(one(seed) for seed in range(200)))
    assert [answer.status_code for answer in answers] == [200] * 200
    assert not any('"error"' in answer.text for answer in answers)


def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "gemma-demo",
        "messages": HELLO,
        "max_tokens": 16,
        "seed": 7,
        "temperature": 1,
    }
    first, second = (client.chat.completions.create(**request).choices[0].message.content for _ in range(2))
    assert first == second

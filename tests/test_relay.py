"""Responses, Anthropic's Messages and tokenizing, with the real clients on the real engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from .conftest import ALICE, ServerProcess
from .test_api_keys import bearer

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def claude(live: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=live.url, api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="gpt-4o-mini", input="Hello!", max_output_tokens=8)
    assert answer.model == "gemma-demo"
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens <= 8


def test_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model="gemma-demo", max_tokens=8, system="Be brief.", messages=HELLO)  # type: ignore[arg-type]
    assert answer.content[0].type == "text"
    assert answer.content[0].text
    assert answer.usage.output_tokens <= 8
    count = claude.messages.count_tokens(model="gemma-demo", system="Be brief.", messages=HELLO)  # type: ignore[arg-type]
    assert count.input_tokens == answer.usage.input_tokens


def test_a_tool_call_that_is_cut_off_is_left_out(claude: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    request: Any = {
        "messages": HELLO,
        "tools": [{"name": "get_weather", "input_schema": schema}],
        "tool_choice": {"type": "tool", "name": "get_weather"},
    }
    answer = claude.messages.create(model="gemma-demo", max_tokens=3, **request)
    assert answer.stop_reason == "max_tokens"
    assert not [block for block in answer.content if block.type == "tool_use"]


def test_messages_stream(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model="gemma-demo", max_tokens=8, messages=HELLO) as stream:  # type: ignore[arg-type]
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].type == "text"
    assert final.content[0].text == text


def test_messages_errors_have_anthropics_shape(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="claude-x", max_tokens=8, messages=HELLO)  # type: ignore[arg-type]
    assert missing.value.body == {
        "type": "error",
        "error": {
            "type": "not_found_error",
            "message": "The model 'claude-x' does not exist; this server has 'gemma-demo'.",
        },
    }
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(
            model="gemma-demo", max_tokens=8, messages=[{"role": "user", "content": "x " * 9000}]
        )


def test_tokenize_and_back(http: httpx.Client) -> None:
    text = "Hello ☃, naïve world"
    tokens = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 4096
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    chat = http.post("/tokenize", json={"messages": HELLO}).json()
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1}).json()
    assert chat["count"] == answer["usage"]["prompt_tokens"]


def test_what_is_too_long_for_the_model_is_not_tokenized(http: httpx.Client) -> None:
    for path, body in (
        ("/tokenize", {"prompt": "fox " * 9000}),
        ("/tokenize", {"prompt": "fox " * 1_000_000, "return_token_strs": True}),
        ("/tokenize", {"messages": [{"role": "user", "content": "fox " * 9000}]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "fox " * 9000}]}),
        ("/detokenize", {"tokens": [5] * 4097}),
    ):
        answer = http.post(path, json={"model": "gemma-demo"} | body)
        error = answer.json()["error"]
        assert answer.status_code == 400 and "maximum context length" in error["message"], answer.text
        assert "code" not in error or error["code"] == "context_length_exceeded"
    assert len(http.post("/detokenize", json={"tokens": [5] * 4096}).json()["prompt"]) > 0


def test_tokenizing_counts_as_a_request(http: httpx.Client) -> None:
    """The limit is alice's, of two a minute."""
    answers = [
        http.post(path, json=body, headers=bearer(ALICE))
        for _ in range(3)
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]}))
    ]
    assert answers[-1].status_code == 429
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {}),
        ("/v1/responses", {"input": 5}),
        ("/v1/responses", {"input": "x", "temperature": "hot"}),
        ("/v1/responses", {"input": "x", "max_output_tokens": -5}),
        ("/v1/responses", {"input": "x", "background": True}),
        ("/v1/responses", {"input": "x", "background": True, "store": "false"}),  # which vLLM would run
        ("/v1/messages", {}),
        ("/v1/messages", {"messages": 5, "max_tokens": 5}),
        ("/v1/messages", {"messages": [{"role": "wizard", "content": "x"}], "max_tokens": 5}),
        ("/v1/messages/count_tokens", {"messages": 5}),
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"messages": [{"role": 5}]}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [2**62]}),
    ],
)
def test_wrong_bodies(http: httpx.Client, path: str, body: dict[str, object]) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]

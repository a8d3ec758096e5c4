"""What clients get wrong, by mistake or on purpose: a 4xx with a sentence, and the engine goes on."""

# ruff: noqa: E501 - a case a line reads best
from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def _the_engine_goes_on(http: httpx.Client) -> Any:
    yield
    assert http.post(CHAT, json=HELLO).status_code == 200


def error(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert body.keys() == {"error"}, body
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert len(body["error"]["message"]) > 10
    assert answer.headers["x-request-id"]
    return dict(body["error"])


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"} | fields]}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "0.5"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": 100_000}, "max_tokens", "4096"),
        ({"n": 1_000_000}, "n", "at most 128"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"seed": 2**70}, "seed", "valid integer"),
        ({"stop": 5}, "stop", "valid string or should be an array"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=True"),
        ({"logit_bias": {"1": 1000}}, "logit_bias.1", "less than or equal to 100"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "integer"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "between 0 and 20"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"tools": []}, "tools", "empty"),
        ({"tools": [5]}, "tools[0]", "object"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "Missing required parameter"),
        ({"tool_choice": "sometimes"}, "tool_choice", "tools"),
        ({"functions": [{"name": "f"}]}, "functions", "use 'tools'"),
        ({"modalities": ["audio"]}, "modalities", "text"),
        ({"max_token": 5}, "max_token", "Did you mean max_tokens?"),
        ({"logits_processors": ["os.system"]}, "logits_processors", "Unrecognized request argument"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "only the operator sets it"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "must not hold"),
        ({"structured_outputs": 5}, None, "wrong type"),
        ({"structured_outputs": {"regex": "((("}}, None, "regex"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4 items"),
        ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag", "Unknown parameter"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, None, ""),
        ({"structured_outputs": {"grammar": "root ::= root"}}, None, ""),
        ({"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs", "must not hold"),
        ({"use_beam_search": True, "length_penalty": 1e308}, "length_penalty", "less than or equal to 10"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params", "no effect"),
        ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs", "only the operator"),
        ({"return_token_offsets": True}, "return_token_offsets", "render"),
        ({"x" * 100_000: 1}, "x" * 200, "Unrecognized"),
        (message(content=[{"type": "image_url"}]), "messages[0].content", "needs 'image_url'"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "no effect"),
        ({"priority": 5}, "priority", "scheduling_policy"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": {"role": "user"}}, "messages", "array"),
        ({"messages": None}, "messages", "array"),
        (message(role="wizard"), "messages[0].role", "'assistant'"),
        (message(content=5), "messages[0].content", "string or should be an array"),
        (message(content=None), "messages[0]", "needs content"),
        (message(content=[{"type": "text"}]), "messages[0].content", "needs 'text'"),
        (message(content=[{"type": "nope"}]), "messages[0].content", "'image_url'"),
        (message(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), "messages", "text only"),
        (message(content="a\0b"), "messages[0].content", "NUL"),
        ({"user": "a\0b"}, "user", "NUL"),
        ({"request_id": "a\nb"}, "request_id", "pattern"),
    ],
)  # fmt: skip
def test_a_wrong_value(http: httpx.Client, change: dict[str, Any], param: str | None, words: str) -> None:
    for stream in (False, True):
        body = ({"stream": True} if stream else {}) | HELLO | change
        if stream and "stream_options" in change:
            continue
        answer = http.post(CHAT, json=body)
        assert answer.status_code == 400, answer.text
        found = error(answer)
        assert words in found["message"]
        assert found["type"] == "invalid_request_error"
        if words:
            assert found["param"] == param
        assert len(answer.content) < 3000


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [5] * 300_000},
        {"messages": [{"role": "user", "content": [5] * 300_000}]},
        {"tools": [5] * 300_000} | HELLO,
        {"stop": [5] * 300_000} | HELLO,
        {"logit_bias": {str(token): 1000 for token in range(100_000)}} | HELLO,
        {"x": "\0", "k" * 100_000: [""] * 100_000} | HELLO,
    ],
    ids=["messages", "parts", "tools", "stop", "logit_bias", "nul"],
)
def test_a_body_full_of_faults_costs_little(http: httpx.Client, body: dict[str, Any]) -> None:
    """Only one fault is told; collecting them all took minutes and gigabytes."""
    answer = http.post(CHAT, json=body)
    assert answer.status_code == 400
    error(answer)


def test_nulls_are_as_good_as_nothing(http: httpx.Client) -> None:
    nulls = dict.fromkeys(
        ("ignore_eos", "min_tokens", "request_id", "stop", "n", "seed", "tools", "logit_bias")
    )
    assert http.post(CHAT, json=HELLO | nulls).status_code == 200


def test_missing_messages(http: httpx.Client) -> None:
    found = error(http.post(CHAT, json={"model": "gemma-demo"}))
    assert (found["param"], found["code"]) == ("messages", "missing_required_parameter")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"messages": "\xff"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a\x00b"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"messages": ' + b"[" * 1_000 + b"]" * 1_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "tools": '
        + b'[{"a":' * 500
        + b"1"
        + b"}]" * 500
        + b"}",
    ],
    ids=lambda raw: raw[:40].decode("latin-1"),
)
def test_what_is_not_a_json_request(http: httpx.Client, raw: bytes) -> None:
    for path in (CHAT, COMPLETION):
        answer = http.post(path, content=raw, headers=JSON)
        assert answer.status_code == 400, answer.text
        error(answer)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_prompt_longer_than_the_context(http: httpx.Client, path: str) -> None:
    for text in ("word " * 5_000, "x" * 9_900_000):
        body = HELLO | message(content=text) if path == CHAT else {"prompt": text}
        for stream in (False, True):
            answer = http.post(path, json=body | {"stream": stream})
            assert answer.status_code == 400
            found = error(answer)
            assert found["code"] == "context_length_exceeded"
            assert found["param"] == ("messages" if path == CHAT else "prompt")
            assert "4096 tokens" in found["message"]


def test_a_body_over_ten_megabytes(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=HELLO | message(content="x" * 10_500_000))
    assert answer.status_code == 413
    error(answer)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [99_999_999]}, "out of vocabulary"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "middle"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "logprobs": 21}, "between 0 and 20"),
        ({"prompt": ["x"] * 5_000}, "1024"),
        ({"prompt": ["x"] * 200, "n": 64}, "12800"),
        ({"prompt": ["a", *[5] * 300_000]}, "prompt"),
    ],
)
def test_a_wrong_completion(http: httpx.Client, body: dict[str, Any], words: str) -> None:
    answer = http.post(COMPLETION, json=body)
    assert answer.status_code == 400, answer.text
    assert words in error(answer)["message"]


def test_unknown_model(http: httpx.Client) -> None:
    for path, body in ((CHAT, HELLO), (COMPLETION, {"prompt": "x"})):
        answer = http.post(path, json=body | {"model": "gpt-5"})
        assert answer.status_code == 404
        assert error(answer)["code"] == "model_not_found"


def test_wrong_content_type(http: httpx.Client) -> None:
    for headers in ({"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        answer = http.post(CHAT, content=json.dumps(HELLO), headers=headers)
        assert answer.status_code == 415
        assert "application/json" in error(answer)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/health", 405),
        ("POST", "/v1/models", 405),
    ],
)
def test_wrong_paths_and_methods(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    error(answer)

"""vLLM's request models: what is right is read as vLLM reads it, what is wrong is found out early."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from gemma_serve.api.schemas import ChatCompletionBody
from gemma_serve.engine.fail_fast import validator
from gemma_serve.engine.relay import REQUESTS

MODELS: dict[str, Any] = {str(kind): model for kind, model in REQUESTS.items()}
MODELS |= {"chat": ChatCompletionRequest, "completion": CompletionRequest}
WRONG = 20_000
TEXT = {"role": "user", "content": "x"}
PARTS = {"role": "user", "content": [5] * WRONG}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("responses", {"input": [5] * WRONG}),
        ("responses", {"input": [PARTS]}),
        ("messages", {"model": "x", "max_tokens": 5, "messages": [5] * WRONG}),
        ("messages", {"model": "x", "max_tokens": 5, "messages": [PARTS]}),
        ("count_tokens", {"model": "x", "messages": [PARTS]}),
        ("tokenize", {"messages": [5] * WRONG}),
        ("detokenize", {"tokens": ["a"] * WRONG}),
        ("embeddings", {"input": ["a", 5] * WRONG}),
        ("chat", {"messages": [TEXT], "allowed_token_ids": ["a"] * WRONG}),
        ("completion", {"prompt": "x", "allowed_token_ids": ["a"] * WRONG}),
    ],
)
def test_a_body_full_of_faults_has_few(kind: str, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        validator(MODELS[kind]).validate_python(body)
    assert caught.value.error_count() < 1000


def test_our_own_schema_has_few_too() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionBody.model_validate(
            {"messages": [TEXT], "stream_options": dict.fromkeys(map(str, range(WRONG)))}
        )
    assert caught.value.error_count() < 1000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("responses", {"request_id": "a", "input": [TEXT], "max_output_tokens": 5}),
        ("messages", {"model": "x", "max_tokens": 5, "messages": [TEXT]}),
        ("tokenize", {"messages": [TEXT]}),
        ("tokenize", {"prompt": "x"}),
        ("detokenize", {"tokens": [1, 2]}),
        ("embeddings", {"request_id": "a", "input": ["a", "b"]}),
        ("chat", {"request_id": "a", "messages": [TEXT], "allowed_token_ids": [1], "stop": "a"}),
        ("completion", {"request_id": "a", "prompt": [[1, 2], [3]], "n": 2}),
    ],
)
def test_what_is_right_is_read_as_vllm_reads_it(kind: str, body: dict[str, Any]) -> None:
    assert validator(MODELS[kind]).validate_python(dict(body)) == TypeAdapter(MODELS[kind]).validate_python(
        dict(body)
    )

"""Each Gemma family, as a tiny random model of its `model_type`, behaves as OpenAI's models do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers

from gemma_serve import demo_model
from gemma_serve.engine.families import BY_MODEL_TYPE, family_of, precision

from .conftest import ServerProcess, start_server

pytestmark = pytest.mark.slow

SIZE: dict[str, Any] = {
    "vocab_size": 3072,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def gemma() -> tuple[Any, Any]:
    config = transformers.GemmaConfig(**SIZE)
    return config, transformers.GemmaForCausalLM


def gemma2() -> tuple[Any, Any]:
    config = transformers.Gemma2Config(**SIZE, sliding_window=64, query_pre_attn_scalar=64)
    return config, transformers.Gemma2ForCausalLM


def gemma3_text() -> tuple[Any, Any]:
    config = transformers.Gemma3TextConfig(**SIZE, sliding_window=64, query_pre_attn_scalar=64)
    return config, transformers.Gemma3ForCausalLM


def make_model(folder: Path, make: Callable[[], tuple[Any, Any]]) -> Path:
    """Random weights, and the embedded model's tokenizer without its chat template."""
    torch.manual_seed(0)
    config, architecture = make()
    architecture(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model.PATH / name, folder / name)
    return folder


@pytest.fixture(scope="module", params=[gemma, gemma2, gemma3_text], ids=lambda make: make.__name__)
def family_server(
    request: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, ServerProcess]]:
    name = request.param.__name__
    folder = make_model(tmp_path_factory.mktemp("models") / name, request.param)
    server = start_server(
        *("--model", str(folder), "--max-length", "1024", "--set", "engine.enforce_eager=true"),
        *("--set", "performance.precision=float16", "--set", "engine.kv_cache_memory_bytes=100000000"),
    )
    try:
        server.wait_for(f"{name}: ready")
        yield name, server
    finally:
        assert server.end() == 0


def test_a_system_message_and_three_user_messages_in_a_row(family_server: tuple[str, ServerProcess]) -> None:
    _, server = family_server
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "One"},
            {"role": "user", "content": [{"type": "text", "text": "Two"}]},
            {"role": "user", "content": "Three"},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": "Four"},
        ],
        "max_tokens": 2,
        "return_prompt_text": True,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["prompt_text"] == (
        "<bos><start_of_turn>user\nBe brief.\n\nBe kind.\n\nOne\n\nTwo\n\nThree<end_of_turn>\n"
        "<start_of_turn>model\nYes<end_of_turn>\n"
        "<start_of_turn>user\nFour<end_of_turn>\n<start_of_turn>model\n"
    )


def test_float16_gives_way_where_it_overflows(family_server: tuple[str, ServerProcess]) -> None:
    name, server = family_server
    warned = f"{BY_MODEL_TYPE[name].name} overflows float16; using" in server.text
    assert warned is not BY_MODEL_TYPE[name].float16


def test_tools(family_server: tuple[str, ServerProcess]) -> None:
    """The call is forced by a grammar: its parsing is the subject, not a random model's choice."""
    name, server = family_server
    written = '[get_weather(city="Paris")]'
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        request: dict[str, Any] = {
            "model": name,
            "messages": [{"role": "user", "content": "Weather?"}],
            "tools": [WEATHER],
            "max_tokens": 100,
            "extra_body": {"structured_outputs": {"choice": [written]}},
        }
        if BY_MODEL_TYPE[name].tool_parser is None:
            with pytest.raises(openai.BadRequestError, match=r"model\.tool_parser"):
                client.chat.completions.create(**request)
            return
        answer = client.chat.completions.create(**request)
        check_call(answer.choices[0].message.tool_calls[0].function, answer.choices[0].finish_reason)
        chunks = list(client.chat.completions.create(**request, stream=True))
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert calls[0].function.name == "get_weather"
        assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"city": "Paris"}
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


def check_call(function: Any, reason: str) -> None:
    assert function.name == "get_weather"
    assert json.loads(function.arguments) == {"city": "Paris"}
    assert reason == "tool_calls"


def test_function_gemma(client: openai.OpenAI) -> None:
    """The embedded model is of this family: its tokenizer has the tokens."""
    written = "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>"
    answer: Any = client.chat.completions.create(
        model="gemma-demo",
        messages=[{"role": "user", "content": "Weather?"}],
        tools=[WEATHER],  # type: ignore[list-item]
        max_tokens=200,
        extra_body={"structured_outputs": {"choice": [written]}},
    )
    check_call(answer.choices[0].message.tool_calls[0].function, answer.choices[0].finish_reason)


def test_the_table() -> None:
    assert family_of("gemma3_text", "… <start_function_call> …").name == "FunctionGemma"
    assert family_of("gemma3_text", "{{ messages }}").name == "Gemma 3"
    assert family_of("llama").template is None
    gemma_2 = BY_MODEL_TYPE["gemma2"]
    assert precision("float16", gemma_2, has_bfloat16=True) == "bfloat16"
    assert precision("float16", gemma_2, has_bfloat16=False) == "float32"
    assert precision("auto", gemma_2, has_bfloat16=True) == "auto"
    assert precision("float16", BY_MODEL_TYPE["gemma"], has_bfloat16=True) == "float16"

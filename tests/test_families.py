"""Each Gemma family, as a tiny random model of its `model_type`, behaves as OpenAI's models do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gemma_serve.engine.families import BY_MODEL_TYPE, family_of, precision
from gemma_serve.engine.shape import read_shape

from .conftest import ServerProcess, start_server
from .test_plan import check_blocks
from .tiny_models import make_model

pytestmark = pytest.mark.slow

FAMILIES = ["gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text"]
LENGTH, CACHE_BYTES = 1024, 100_000_000
BATCH = ("--set", f"engine.max_num_batched_tokens={LENGTH}")
# xgrammar 0.2 mixes up the special tokens of several grammars.
GUIDED = ("--set", 'engine.structured_outputs_config={"backend": "guidance"}')
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def start_family(model_type: str, folder: Path, *arguments: str, **options: Any) -> ServerProcess:
    """A server with a tiny model of the type, asked for float16."""
    make_model(model_type, folder / model_type)
    return start_server(
        *("--model", str(folder / model_type), "--max-length", str(LENGTH)),
        *("--set", "engine.enforce_eager=true", "--set", f"engine.kv_cache_memory_bytes={CACHE_BYTES}"),
        *("--set", "performance.precision=float16"),
        *arguments,
        **options,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the models, each below it by its type."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def started(folder: Path) -> Iterator[dict[str, ServerProcess]]:
    """By type: what was started ahead."""
    servers: dict[str, ServerProcess] = {}
    yield servers
    for server in servers.values():
        server.end()


@pytest.fixture(scope="module", params=FAMILIES)
def family_server(
    request: Any, folder: Path, started: dict[str, ServerProcess]
) -> Iterator[tuple[str, ServerProcess]]:
    place = FAMILIES.index(request.param)
    for name in FAMILIES[place : place + 2]:  # the next one too: a start keeps but one core busy
        if name not in started:
            started[name] = start_family(name, folder, *BATCH, *(GUIDED if name == "gemma4_text" else ()))
    server = started.pop(request.param)
    try:
        server.wait_for(f"{request.param}: ready")
        yield request.param, server
    finally:
        assert server.end() == 0


def test_a_system_message_and_three_user_messages_in_a_row(family_server: tuple[str, ServerProcess]) -> None:
    name, server = family_server
    if name == "gemma4_text":
        check_roles(server, GEMMA_4_PROMPT)
    else:
        check_roles(server, PROMPT)


PROMPT = (
    "<bos><start_of_turn>user\nBe brief.\n\nBe kind.\n\nOne\n\nTwo\n\nThree<end_of_turn>\n"
    "<start_of_turn>model\nYes<end_of_turn>\n"
    "<start_of_turn>user\nFour<end_of_turn>\n<start_of_turn>model\n"
)
GEMMA_4_PROMPT = "".join(
    f"<|turn>{role}\n{text}<turn|>\n"
    for role, text in (
        ("system", "Be brief.\n\nBe kind."),
        *(("user", "One"), ("user", "Two"), ("user", "Three"), ("model", "Yes"), ("user", "Four")),
    )
)
GEMMA_4_PROMPT = f"<bos>{GEMMA_4_PROMPT}<|turn>model\n"


def check_roles(server: ServerProcess, prompt: str) -> None:
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
    assert answer.json()["prompt_text"] == prompt


def test_float16_gives_way_where_it_overflows(family_server: tuple[str, ServerProcess]) -> None:
    check_float16(*family_server)


def check_float16(name: str, server: ServerProcess) -> None:
    warned = f"{BY_MODEL_TYPE[name].name} overflows float16; using" in server.text
    assert warned is not BY_MODEL_TYPE[name].float16


def test_tools(family_server: tuple[str, ServerProcess]) -> None:
    name, server = family_server
    if BY_MODEL_TYPE[name].tool_parser is None:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=asking(WEATHER), timeout=60)
        assert answer.status_code == 400
        assert "model.tool_parser" in answer.json()["error"]["message"]
    elif name == "gemma4_text":
        check_call(server, gemma_4(*CALL))
    else:
        check_call(server, {"choice": ['[get_weather(city="Paris")]']})


def asking(*tools: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Weather?"}], "max_tokens": 150} | (
        {"tools": tools} if tools else {}
    )


def check_call(server: ServerProcess, grammar: dict[str, Any]) -> None:
    """The grammar forces the call: its parsing is the subject, not a random model's choice."""
    message, reason = generate(server, asking(WEATHER) | {"structured_outputs": grammar})
    assert reason == "tool_calls"
    assert not message.content
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def generate(server: ServerProcess, body: dict[str, Any]) -> tuple[Any, str]:
    """The message and why it ended, the same streamed and not."""
    extra = {name: body.pop(name) for name in ("structured_outputs", "chat_template_kwargs") if name in body}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        served = client.models.list().data[0].id
        request: Any = body | {"model": served, "extra_body": extra}
        whole = client.chat.completions.create(**request).choices[0]
        with client.chat.completions.stream(**request) as stream:
            streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == whole.finish_reason
    for name in ("content", "reasoning"):
        assert (getattr(streamed.message, name, None) or "") == (getattr(whole.message, name, None) or "")
    calls = [[call.function for call in choice.message.tool_calls or []] for choice in (whole, streamed)]
    assert [(call.name, call.arguments) for call in calls[0]] == [
        (call.name, call.arguments) for call in calls[1]
    ]
    return whole.message, whole.finish_reason


def gemma_4(*parts: str) -> dict[str, Any]:
    """A grammar that allows just this text, in which Gemma 4's marks are its special tokens."""
    return {"grammar": "start: " + " ".join(part if part[0] == "<" else json.dumps(part) for part in parts)}


THOUGHT = ("<|channel>", "thought\nIt is sunny.", "<channel|>")
CALL = ("<|tool_call>", "call:get_weather{city:", '<|"|>', "Paris", '<|"|>', "}", "<tool_call|>")


def test_gemma_4_reasons(family_server: tuple[str, ServerProcess]) -> None:
    name, server = family_server
    if name != "gemma4_text":
        return
    message, reason = generate(server, asking() | {"structured_outputs": gemma_4(*THOUGHT, "Sunny.")})
    assert (message.reasoning, message.content, reason) == ("It is sunny.", "Sunny.", "stop")
    message, reason = generate(server, asking(WEATHER) | {"structured_outputs": gemma_4(*THOUGHT, *CALL)})
    assert (message.reasoning, message.tool_calls[0].function.name) == ("It is sunny.", "get_weather")
    assert reason == "tool_calls"


def test_chat_template_kwargs(family_server: tuple[str, ServerProcess]) -> None:
    name, server = family_server
    for kwargs, accepted in (
        ({"enable_thinking": True}, name == "gemma4_text"),
        ({"enable_thinking": False}, True),
        ({"enable_thinkin": True}, False),
        ({"tokenize": True}, False),
        ({"chat_template": "{{ 1 }}"}, False),
        ({"bos_token": "x"}, False),
    ):
        body = asking() | {"max_tokens": 1, "chat_template_kwargs": kwargs, "return_prompt_text": True}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == (200 if accepted else 400), (kwargs, answer.text)
        if accepted:
            assert ("<|think|>" in answer.json()["prompt_text"]) is (kwargs["enable_thinking"] is True)
        else:
            assert answer.json()["error"]["param"] == "chat_template_kwargs"


def test_the_cache_has_the_blocks_that_are_predicted(
    family_server: tuple[str, ServerProcess], folder: Path
) -> None:
    """By `gemma-server plan`, of which `test_plan.py` shows the rest."""
    name, server = family_server
    check_blocks(server, read_shape(str(folder / name)), CACHE_BYTES, LENGTH)


def test_function_gemma(live: ServerProcess) -> None:
    """The embedded model is of this family: its tokenizer has the tokens."""
    call = "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>"
    check_call(live, {"choice": [call]})


def test_the_table() -> None:
    assert family_of("gemma3_text", "… <start_function_call> …").name == "FunctionGemma"
    assert family_of("gemma3_text", "{{ messages }}").name == "Gemma 3"
    assert family_of("llama").template is None
    gemma_2 = BY_MODEL_TYPE["gemma2"]
    assert precision("float16", gemma_2, has_bfloat16=True) == "bfloat16"
    assert precision("float16", gemma_2, has_bfloat16=False) == "float32"
    assert precision("auto", gemma_2, has_bfloat16=True) == "auto"
    assert precision("float16", BY_MODEL_TYPE["gemma"], has_bfloat16=True) == "float16"

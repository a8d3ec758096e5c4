"""The clients that applications use, on the real server: a chat, a stream, a tool round trip, a JSON answer.

The tests must hold for random weights: so a call is forced, what a grammar allows is one of a few, and
where a grammar ends the answer there is room: it allows white space, of which noise has much.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from .conftest import ServerProcess

MODEL = "gemma-demo"
QUESTION: Any = [{"role": "user", "content": "How is the weather in Paris?"}]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
RESULT = "Sunny, 21 degrees"


class Weather(BaseModel):
    """An answer whose every value is one of a few."""

    city: Literal["Paris", "Oslo"]
    sky: Literal["sunny", "grey"]


# OpenAI's client; its fixture `client` refuses every answer that differs from OpenAI's schema.

TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather now.", "parameters": CITY},
}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=8)
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


def test_openai_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, max_tokens=64, stop=["e", "a"], stream_options={"include_usage": True}
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"
    assert (final.choices[0].message.content or "") == text
    assert final.usage is not None


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openai_tool_round_trip(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": QUESTION,
        "tools": [TOOL],
        "tool_choice": choice,
        "parallel_tool_calls": False,
    }
    if stream:
        with client.chat.completions.stream(**request) as events:
            answer: Any = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**request)
    message, reason = answer.choices[0].message, answer.choices[0].finish_reason
    (call,) = message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments)["city"] in CITY["properties"]["city"]["enum"]
    assert not message.content
    assert stream or message.content is None
    assert reason == ("tool_calls" if choice == "required" else "stop")  # as at OpenAI
    told: Any = [*QUESTION, message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    answer = client.chat.completions.create(model=MODEL, messages=told, tools=[TOOL], max_tokens=8)
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens > 0


def test_openai_structured_output(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Weather)
    assert isinstance(answer.choices[0].message.parsed, Weather)


# OpenAI's client on its newer API, `/v1/responses`.


def test_responses_stream(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input="Hello!", max_output_tokens=8, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_responses_tool_round_trip(client: openai.OpenAI, stream: bool) -> None:
    tools: Any = [{"type": "function", "name": "get_weather", "parameters": CITY, "strict": True}]
    request: dict[str, Any] = {
        "model": MODEL,
        "tools": tools,
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    if stream:
        with client.responses.stream(input=QUESTION, **request) as events:
            answer: Any = events.get_final_response()
    else:
        answer = client.responses.create(input=QUESTION, **request)
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert call.name == "get_weather"
    assert json.loads(call.arguments)["city"] in CITY["properties"]["city"]["enum"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    told: Any = [*QUESTION, *answer.output, result]
    final = client.responses.create(model=MODEL, input=told, tools=tools, max_output_tokens=8)
    assert final.output_text


def test_responses_structured_output(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model=MODEL, input="Hello!", text_format=Weather)
    assert isinstance(answer.output_parsed, Weather)


# Anthropic's client, on `/v1/messages`.

CLAUDE_TOOL: Any = {"name": "get_weather", "description": "The weather now.", "input_schema": CITY}


@pytest.fixture
def claude(live: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=live.url, api_key="unused", max_retries=0, timeout=120, _strict_response_validation=True
    ) as client:
        yield client


def test_anthropic_chat(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model=MODEL, max_tokens=8, system="Be brief.", messages=QUESTION)
    assert answer.content[0].type == "text"
    assert answer.content[0].text
    assert answer.stop_reason in ("max_tokens", "end_turn")


def test_anthropic_stream(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model=MODEL, max_tokens=8, messages=QUESTION) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text
    assert final.content[0].type == "text"
    assert final.content[0].text == text


@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=["any", "named"]
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_anthropic_tool_round_trip(claude: anthropic.Anthropic, choice: Any, stream: bool) -> None:
    choice = choice | {"disable_parallel_tool_use": True}
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": QUESTION,
        "tools": [CLAUDE_TOOL],
        "tool_choice": choice,
        "max_tokens": 2000,
    }
    if stream:
        with claude.messages.stream(**request) as events:
            answer: Any = events.get_final_message()
    else:
        answer = claude.messages.create(**request)
    assert answer.stop_reason == "tool_use"
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert call.name == "get_weather"
    assert call.input["city"] in CITY["properties"]["city"]["enum"]
    told: Any = [
        *QUESTION,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": RESULT}]},
    ]
    answer = claude.messages.create(model=MODEL, messages=told, tools=[CLAUDE_TOOL], max_tokens=8)
    assert answer.content[0].text


def test_anthropic_structured_output(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.parse(model=MODEL, messages=QUESTION, output_format=Weather, max_tokens=2000)
    assert isinstance(answer.parsed_output, Weather)


# LangChain's, which speaks both of OpenAI's APIs.


@tool
def get_weather(city: Literal["Paris", "Oslo"]) -> str:
    """The weather now."""
    return f"{city}: {RESULT}"


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def langchain(live: ServerProcess, request: pytest.FixtureRequest) -> ChatOpenAI:
    return ChatOpenAI(
        use_responses_api=request.param,
        base_url=f"{live.url}/v1",
        api_key="unused",
        model=MODEL,
        max_retries=0,
        timeout=120,
        stream_usage=True,  # LangChain asks for it by itself only at OpenAI's own address
    )


def test_langchain_chat(langchain: ChatOpenAI) -> None:
    answer = langchain.invoke([("system", "Be brief."), ("user", "Hello!")], max_tokens=8)
    assert answer.text
    assert answer.usage_metadata is not None


def test_langchain_stream(langchain: ChatOpenAI) -> None:
    chunks = list(langchain.stream("Hello!", max_tokens=8))
    assert len(chunks) > 2
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.text
    assert whole.usage_metadata is not None


@pytest.mark.parametrize("choice", ["required", "get_weather"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_langchain_tool_round_trip(langchain: ChatOpenAI, choice: str, stream: bool) -> None:
    bound = langchain.bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False)
    question = HumanMessage("How is the weather in Paris?")
    answer: Any
    if stream:
        answer = AIMessageChunk(content="")
        for chunk in bound.stream([question]):
            answer += chunk
    else:
        answer = bound.invoke([question])
    (call,) = answer.tool_calls
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert RESULT in result.text
    told: list[BaseMessage] = [question, answer, result]
    final = langchain.bind_tools([get_weather]).invoke(told, max_tokens=8)
    assert isinstance(final, AIMessage)
    assert final.text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(langchain: ChatOpenAI, method: Any) -> None:
    answer = langchain.with_structured_output(Weather, method=method).invoke("How is the weather in Paris?")
    assert isinstance(answer, Weather)

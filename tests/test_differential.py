"""Our answers against vLLM's own handlers on the same engine, one at a time, prefix cache off."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import pytest_asyncio
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from .conftest import InProcess

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}

STORY = [{"role": "user", "content": "Tell me a story."}]  # which is longer than any limit below
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "max_tokens": 24}
COMMON: list[dict[str, Any]] = [
    GREEDY,
    SAMPLED,
    SAMPLED | {"n": 3},
    SAMPLED | {"top_k": 5, "min_p": 0.01},
    GREEDY | {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    GREEDY | {"repetition_penalty": 1.3},
    GREEDY | {"logit_bias": {"300": 50, "301": 50}},
    GREEDY | {"stop": ["a"]},
    GREEDY | {"stop": ["e", "o"], "include_stop_str_in_output": True},
    GREEDY | {"stop_token_ids": [300, 301, 302], "logit_bias": {"301": 80}},
    GREEDY | {"max_tokens": 1},
    GREEDY | {"min_tokens": 20, "ignore_eos": True},
    GREEDY | {"bad_words": [" the"]},
    GREEDY | {"allowed_token_ids": list(range(300, 400))},
    GREEDY | {"structured_outputs": {"regex": "[a-c]{3,9}"}},
    GREEDY | {"structured_outputs": {"choice": ["yes", "naïve ☃ 日本"]}},
    GREEDY | {"skip_special_tokens": False},
    GREEDY | {"return_token_ids": True},
    SAMPLED | {"stream_interval": 4},
]
CHAT: list[dict[str, Any]] = [
    *COMMON,
    GREEDY | {"logprobs": True},
    SAMPLED | {"logprobs": True, "top_logprobs": 3, "n": 2},
    GREEDY | {"max_completion_tokens": 3},
    GREEDY | {"response_format": {"type": "json_object"}},
    GREEDY | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    GREEDY | {"tools": [WEATHER]},
    GREEDY | {"tools": [WEATHER], "messages": QUESTION, "max_tokens": 200},
    GREEDY | {"tools": [WEATHER], "max_tokens": 200, "structured_outputs": {"choice": [CALL]}},
    GREEDY
    | {"tools": [WEATHER], "max_tokens": 200, "structured_outputs": {"choice": ["Hm. " + CALL + CALL]}},
    GREEDY | {"tools": [WEATHER], "tool_choice": "none"},
    GREEDY | {"max_tokens": 200, "structured_outputs": {"choice": [CALL]}},
]
COMPLETION: list[dict[str, Any]] = [
    *COMMON,
    GREEDY | {"logprobs": 2},
    GREEDY | {"echo": True},
    GREEDY | {"echo": True, "max_tokens": 0},
    GREEDY | {"prompt": ["Once", "Twice"]},
    SAMPLED | {"prompt": ["Once", "Twice"], "n": 2, "logprobs": 1},
    GREEDY | {"prompt": [2, 300, 301]},
    GREEDY | {"prompt": [[2, 300], [2, 301, 302]]},
]


@dataclass
class Pair:
    """Ours over HTTP, theirs in process, on one engine."""

    client: httpx.AsyncClient
    chat: OpenAIServingChat
    completion: OpenAIServingCompletion

    async def ours(self, path: str, body: dict[str, Any]) -> str:
        answer = await self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.text

    async def theirs(self, path: str, body: dict[str, Any]) -> str:
        if "chat" in path:
            answer = await self.chat.create_chat_completion(ChatCompletionRequest.model_validate(body))
        else:
            answer = await self.completion.create_completion(CompletionRequest.model_validate(body))
        if body.get("stream"):
            return "".join([event async for event in answer])
        return str(answer.model_dump_json())


@pytest_asyncio.fixture(loop_scope="session")
async def pair(in_process: InProcess) -> AsyncIterator[Pair]:
    ours = in_process.engine._serving
    assert ours is not None
    names = OpenAIServingModels(ours.supervisor, [BaseModelPath(name="gemma-demo", model_path="x")])
    shared: Any = {
        "online_renderer": ours.renderer,
        "request_logger": None,
        "enable_prompt_tokens_details": True,
    }
    chat = OpenAIServingChat(
        ours.supervisor,
        names,
        "assistant",
        chat_template=None,
        chat_template_content_format="auto",
        enable_auto_tools=True,
        tool_parser="functiongemma",
        **shared,
    )
    async with httpx.AsyncClient(base_url=in_process.url, timeout=60) as client:
        yield Pair(client, chat, OpenAIServingCompletion(ours.supervisor, names, **shared))


def joined(text: str, stream: bool) -> dict[int, dict[str, Any]]:
    """Each choice's whole content, however it was cut into chunks."""
    if not stream:
        choices = json.loads(text)["choices"]
    else:
        events = [event.removeprefix("data: ") for event in text.split("\n\n")]
        choices = [
            choice
            for event in events
            if event and event != "[DONE]"
            for choice in json.loads(event)["choices"]
        ]
    found: dict[int, dict[str, Any]] = {}
    for choice in choices:
        into = found.setdefault(
            choice["index"],
            {"text": "", "reason": None, "stop_reason": None, "ids": [], "calls": {}, "logprobs": []},
        )
        message = choice.get("message") or choice.get("delta") or {}
        into["text"] += (message.get("content") or "") + (choice.get("text") or "")
        into["reason"] = choice.get("finish_reason") or into["reason"]
        into["stop_reason"] = choice.get("stop_reason") or into["stop_reason"]
        into["ids"] += choice.get("token_ids") or []
        for position, call in enumerate(message.get("tool_calls") or []):
            name, arguments = into["calls"].get(call.get("index", position), ("", ""))
            function = call.get("function") or {}
            into["calls"][call.get("index", position)] = (
                name or function.get("name"),
                arguments + (function.get("arguments") or ""),
            )
        logprobs = choice.get("logprobs") or {}
        into["logprobs"] += logprobs.get("content") or list(
            zip(logprobs.get("tokens", []), logprobs.get("token_logprobs", []), strict=True)
        )
    return found


def usage(text: str, stream: bool) -> Any:
    if not stream:
        return json.loads(text)["usage"]
    return json.loads(text.strip().split("\n\n")[-2].removeprefix("data: "))["usage"]


def plain(counts: dict[str, Any]) -> dict[str, Any]:
    return {name: counts[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("path", "request_body"),
    [
        *(("/v1/chat/completions", {"messages": STORY} | case) for case in CHAT),
        *(("/v1/completions", {"prompt": "Once upon a time"} | case) for case in COMPLETION),
    ],
)
async def test_ours_equals_vllms(pair: Pair, path: str, request_body: dict[str, Any], stream: bool) -> None:
    body = {"model": "gemma-demo", **request_body}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    ours, theirs = await pair.ours(path, body), await pair.theirs(path, body)
    assert joined(ours, stream) == joined(theirs, stream)
    assert plain(usage(ours, stream)) == plain(usage(theirs, stream))

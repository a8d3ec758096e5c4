"""Short prompts are rendered on the event loop, long ones beside it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from gemma_serve.engine.short_prompts import LONGEST, _is_short

from .conftest import InProcess

PART = {"type": "text", "text": "Hi"}
LONG = [{"role": "user", "content": "word " * 600}]
CONVERSATIONS: dict[str, tuple[bool, list[dict[str, Any]]]] = {
    "a text": (False, [{"role": "user", "content": "Hi"}]),
    "parts": (False, [{"role": "user", "content": [PART, PART]}]),
    "a long text": (True, LONG),
}


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("kind", CONVERSATIONS)
async def test_which_go_to_a_thread(
    in_process: InProcess, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    assert in_process.engine._llm is not None
    executor = in_process.engine._llm.renderer._executor
    submit, calls = executor.submit, []

    def seen(call: Any, *args: Any) -> Any:
        calls.append(call)
        return submit(call, *args)

    monkeypatch.setattr(executor, "submit", seen)
    threaded, messages = CONVERSATIONS[kind]
    body = {"messages": messages, "max_tokens": 1}
    async with httpx.AsyncClient(base_url=in_process.url, timeout=120) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == (400 if threaded else 200), answer.text  # it is too long for the model
    assert bool(calls) == threaded


@pytest.mark.parametrize(
    ("message", "short"),
    [
        ({"content": "Hi"}, True),
        ({"content": None}, True),
        ({"content": []}, True),
        ({"content": [PART, "as vLLM has some", PART]}, True),
        ({"content": "a" * LONGEST}, False),
        ({"content": [PART] * 1000}, False),
        ({"content": [{"type": "text", "text": ""}] * 1000}, False),
        ({"content": [PART, {"type": "image"}]}, False),
        ({"content": "", "tool_calls": [{"function": {"name": "x", "arguments": {}}}]}, False),
    ],
)
def test_what_is_short(message: dict[str, Any], short: bool) -> None:
    assert _is_short([{"role": "user", "content": "Hi"}, {"role": "assistant", **message}]) == short
    assert not _is_short([{"role": "user", **message}] * 101)

"""The response cache before the real engine: a hit is what the engine gave."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest

from gemma_serve.app import create_app
from gemma_serve.engine.base import EngineState, EngineStatus
from gemma_serve.engine.lifecycle import VLLMEngine

from .conftest import InProcess, serving, until
from .test_cache import ASK, CHAT, anonymous, settings, storage
from .test_cached_generation import read, said, waiting

__all__ = ["storage"]  # a fixture

PLAIN = ASK | {"max_tokens": 12}
TOOLS = PLAIN | {
    "max_tokens": 60,
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    "tool_choice": {"type": "function", "function": {"name": "add"}},
}
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, PLAIN),
    (CHAT, PLAIN | {"seed": 3, "temperature": 0.9, "n": 2}),
    (CHAT, PLAIN | {"logprobs": True, "top_logprobs": 2}),
    (CHAT, PLAIN | {"return_token_ids": True}),
    (
        CHAT,
        PLAIN | {"stop": ["e"], "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    (CHAT, TOOLS),
    ("/v1/completions", {"prompt": ["One", "Two"], "temperature": 0, "max_tokens": 12}),
    ("/v1/completions", {"prompt": "One", "temperature": 0, "max_tokens": 12, "logprobs": 2}),
    ("/v1/completions", {"prompt": "One", "temperature": 0, "max_tokens": 12, "echo": True}),
]


class Running:
    """An engine that another server runs: a second one may use it, not start or stop it."""

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine
        self.status = EngineStatus()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self) -> None:
        self.status.set(EngineState.READY)

    async def stop(self) -> None: ...


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
async def test_a_hit_is_what_the_real_engine_gave(in_process: InProcess, storage: str | None) -> None:
    """Byte for byte what filled it, but for id and time; and what either form left serves the other."""
    app = create_app(settings(storage), Running(in_process.engine))
    wrong = []
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=120) as http:
        for path, question in QUESTIONS:
            ask = {
                "stream": {"stream_options": {"include_usage": True}} | question | {"stream": True},
                "whole": {name: value for name, value in question.items() if name != "stream_options"},
            }
            refused = {"Cache-Control": "no-store"}
            live = {form: (await http.post(path, json=ask[form], headers=refused)).text for form in ask}
            apart = {"tools", "echo", "return_token_ids", "stream_options"} & question.keys()
            for first, second in (("stream", "whole"), ("whole", "stream")):
                assert (await http.delete("/v1/cache")).status_code == 200
                filled = ""
                for form, kind in ((first, "miss"), (first, "hit"), (second, "miss" if apart else "hit")):
                    answer = await http.post(path, json=ask[form])
                    await until(lambda: not app.state.cache.flights)
                    filled = filled or without_ids(answer.text)
                    if form == "whole":
                        right = same(answer.text, live[form])
                    elif (
                        first == "stream"
                    ):  # in how many pieces the engine gives it differs from time to time
                        right = without_ids(answer.text) == filled
                    else:
                        right = said(answer.text) == said(live[form])
                    if not right or answer.headers["x-cache"] != kind:
                        wrong.append(
                            (question, first, form, kind, answer.headers["x-cache"], answer.text, live[form])
                        )
    assert not wrong, "\n".join(map(str, wrong))


def without_ids(text: str) -> str:
    return re.sub(r'"id":"[^"]*"|"created":\d+', "", text)


def same(one: str, other: str) -> bool:
    """Two whole answers, but for what is each answer's own."""
    first, second = (re.sub(r"chatcmpl-tool-\w+", "", anonymous(text)) for text in (one, other))
    return first == second


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
async def test_the_real_engine_goes_on_for_who_is_left(in_process: InProcess) -> None:
    app = create_app(settings(), Running(in_process.engine))
    ask = ASK | {"max_tokens": 900, "ignore_eos": True}
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=120) as http:
        refused = {"Cache-Control": "no-store"}
        live = (await http.post(CHAT, json=ask, headers=refused)).json()["choices"][0]["message"]["content"]
        readers: list[list[str]] = [[], [], []]
        asked = []
        for lines in readers:
            asked.append(asyncio.create_task(read(http, lines, ask)))
            await until(lambda lines=lines: len(lines) > 4, 60)  # type: ignore[misc]
        assert waiting(app.state.cache) == 3 and in_process.unfinished() == 1
        for task in asked[:2]:
            task.cancel()
        await asyncio.gather(*asked[:2], return_exceptions=True)
        await asked[2]
        assert said("\n".join(readers[2])) == live and "data: [DONE]" in readers[2]
        assert (await http.post(CHAT, json=ask)).headers["x-cache"] == "hit"

        last = asyncio.create_task(read(http, lines := [], ask | {"max_tokens": 901}))
        await until(lambda: len(lines) > 4, 60)
        assert in_process.unfinished() == 1
        last.cancel()
        await until(lambda: in_process.unfinished() == 0 and not app.state.cache.flights)

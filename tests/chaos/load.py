"""Many clients at once, of every kind, each with an answer that can be compared between runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anthropic
import openai

SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "note": {"type": "string", "maxLength": 60}},
    "required": ["mood", "note"],
}
NO_STOP = {"ignore_eos": True}


@dataclass
class Answer:
    """What a client got, joined; `==` is what "nothing lost, nothing twice" means."""

    text: str = ""
    finish_reasons: list[str | None] = field(default_factory=list)
    completion_tokens: int = 0
    logprobs: list[float] = field(default_factory=list)


class Load:
    """A fixed set of requests; `tokens` counts what all clients have received so far."""

    def __init__(self, url: str, size: int) -> None:
        self._openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self._anthropic = anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=600)
        self._size = size
        self.tokens = 0

    def begin(self) -> asyncio.Task[list[Answer | BaseException]]:
        self.tokens = 0  # now: who waits for some is not to see those of the last run
        return asyncio.create_task(self.run())

    async def run(self) -> list[Answer | BaseException]:
        self.tokens = 0
        kinds: list[Callable[[int], Any]] = [
            lambda i: self._chat(i, temperature=0),
            lambda i: self._whole(i, temperature=0),
            lambda i: self._chat(i, temperature=0.8, seed=i),
            lambda i: self._whole(i, temperature=0.8, seed=i),
            lambda i: self._chat(i, temperature=0, presence_penalty=0.7, frequency_penalty=0.3),
            lambda i: self._chat(i, temperature=0, stop=["e s", "th", " a b"]),
            lambda i: self._chat(i, temperature=0, logprobs=True, top_logprobs=2),
            lambda i: self._chat(i, temperature=0, response_format=_json_schema(), extra_body={}),
            lambda i: self._completion(i, temperature=0.7, seed=i, n=2),
            lambda i: self._chat(i, temperature=0, extra_body={**NO_STOP, "repetition_penalty": 1.2}),
            lambda i: self._responses(i),
            lambda i: self._messages(i),
        ]
        work = [kinds[i % len(kinds)](i) for i in range(self._size)]
        answers: list[Answer | BaseException] = await asyncio.gather(*work, return_exceptions=True)
        return answers

    async def aclose(self) -> None:
        await self._openai.close()
        await self._anthropic.close()

    async def _chat(self, i: int, **parameters: Any) -> Answer:
        stream = await self._openai.chat.completions.create(
            model="gemma-demo",
            messages=_messages(i),
            max_tokens=_length(i),
            stream=True,
            stream_options={"include_usage": True},
            **{"extra_body": NO_STOP, **parameters},
        )
        answer = Answer()
        async for chunk in stream:
            for choice in chunk.choices:
                self.tokens += 1
                answer.text += choice.delta.content or ""
                if choice.finish_reason:
                    answer.finish_reasons.append(choice.finish_reason)
                if choice.logprobs and choice.logprobs.content:
                    answer.logprobs += [round(token.logprob, 4) for token in choice.logprobs.content]
            if chunk.usage:
                answer.completion_tokens = chunk.usage.completion_tokens
        return answer

    async def _whole(self, i: int, **parameters: Any) -> Answer:
        completion = await self._openai.chat.completions.create(
            model="gemma-demo", messages=_messages(i), max_tokens=_length(i), extra_body=NO_STOP, **parameters
        )
        (choice,) = completion.choices
        assert completion.usage is not None
        return Answer(
            choice.message.content or "", [choice.finish_reason], completion.usage.completion_tokens
        )

    async def _completion(self, i: int, **parameters: Any) -> Answer:
        stream = await self._openai.completions.create(
            model="gemma-demo",
            prompt=f"Once upon a time {i}",
            max_tokens=_length(i),
            stream=True,
            stream_options={"include_usage": True},
            extra_body=NO_STOP,
            **parameters,
        )
        texts: dict[int, str] = {}
        answer = Answer()
        async for chunk in stream:
            for choice in chunk.choices:
                self.tokens += 1
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                if choice.finish_reason:
                    answer.finish_reasons.append(choice.finish_reason)
            if chunk.usage:
                answer.completion_tokens = chunk.usage.completion_tokens
        answer.text = "|".join(texts[index] for index in sorted(texts))
        return answer

    async def _responses(self, i: int) -> Answer:
        stream = await self._openai.responses.create(
            model="gemma-demo",
            input=f"Tell me about number {i}",
            max_output_tokens=_length(i),
            temperature=0,
            stream=True,
            extra_body=NO_STOP,
        )
        answer = Answer()
        async for event in stream:
            if event.type == "response.output_text.delta":
                self.tokens += 1
                answer.text += event.delta
            elif event.type in ("response.completed", "response.incomplete"):
                assert event.response.usage is not None
                assert event.response.output_text == answer.text
                answer.finish_reasons.append(event.response.status)
                answer.completion_tokens = event.response.usage.output_tokens
        return answer

    async def _messages(self, i: int) -> Answer:
        async with self._anthropic.messages.stream(
            model="gemma-demo",
            max_tokens=_length(i),
            extra_body={"temperature": 0},
            messages=[{"role": "user", "content": f"Tell me about number {i}"}],
        ) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        return Answer(text, [final.stop_reason], final.usage.output_tokens)


def _messages(i: int) -> Any:
    return [{"role": "user", "content": f"Tell me a story about {'mice and ' * (i % 7)}number {i}. ☃"}]


def _length(i: int) -> int:
    return 60 + 13 * i % 100


def _json_schema() -> Any:
    return {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA}}

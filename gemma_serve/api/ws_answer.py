"""One answer of a WebSocket chat: the session's history into a prompt, and its answer into the session."""

from __future__ import annotations

import time
from typing import Any

from ..chat_history import token_bound, within_context, within_limits
from ..chat_protocol import Chat, Regenerate
from ..engine.base import CacheUse, Usage
from ..errors import InvalidRequest
from ..generation import Generator
from ..logs import RequestRecord
from ..models import Models
from ..sessions import Session, Sessions, history_bytes
from ..settings import Settings
from .body import validated
from .generate import generation_request
from .schemas import ChatCompletionBody
from .ws_tokens import Tokens


class Answer:
    """`prepare`, `write`, then `keep`, however it ended; `data` tells what there is of it."""

    def __init__(
        self,
        request: Regenerate,
        tokens: Tokens,
        messages: int,
        generator: Generator,
        models: Models,
        settings: Settings,
    ) -> None:
        self._request = request
        self._tokens = tokens
        self._generator = generator
        self._models = models
        self._settings = settings
        self._started = time.perf_counter()
        self._history: list[dict[str, str]] = []
        self._question = ""
        self._system: str | None = None
        self._version = 0
        self._usage = Usage()
        self.messages = messages
        """How many the session has now."""

    @property
    def history_messages(self) -> int:
        """How many go into the prompt besides the question."""
        return len(self._history)

    async def prepare(self, session: Session) -> int:
        """Take history and question. Returns how many old messages were dropped. Raises `ServeError`."""
        request = self._request
        validated(ChatCompletionBody, {"messages": [{"role": "user", "content": ""}], **request.parameters()})
        history = list(session.messages)
        bound = session.tokens
        if isinstance(request, Chat):
            if request.keep is not None:
                if request.keep > len(history):
                    message = f"'keep' is {request.keep}; the history has {len(history)} messages."
                    raise InvalidRequest(message, param="keep", code="invalid_value")
                del history[request.keep :]
            self._question = request.message
        else:
            while history and history[-1]["role"] == "assistant":
                history.pop()
            if not history:
                raise InvalidRequest("There is no question to answer again.", code="nothing_to_regenerate")
            self._question = history.pop()["content"]
        self.messages = len(session.messages)
        self._version, self._system, self._history = session.version, session.system, history
        dropped = self._trim(history)
        if not bound or len(history) != len(session.messages):
            bound = token_bound(self._system, *(message["content"] for message in history))
        bound += token_bound(self._question)
        if (context := self._models.context_length(self._models.resolve(request.model))) is not None:
            answer = request.max_completion_tokens or request.max_tokens
            answer = answer if isinstance(answer, int) else None
            dropped += await within_context(history, bound, answer, context, self._count)
        return dropped

    async def write(self) -> None:
        """Generate. Raises `ServeError`, `ClientLeft`."""
        body: dict[str, Any] = {"messages": self._prompt(), "stream": True, **self._request.parameters()}
        size = sum(len(message["content"]) for message in body["messages"])
        cache: CacheUse = (
            "use" if isinstance(self._request, Chat) else "refresh"
        )  # asked again: another answer
        work = generation_request("chat", body, self._models, self._settings.limits, size, cache)
        stream = await self._generator.stream(work)
        self._tokens.on_first = stream.note_first_token
        try:
            self._usage = stream.tokens.usage
            await stream.feed(self._tokens)
        finally:
            await stream.aclose()
            self._tokens.end()
            self._usage = stream.tokens.usage

    async def keep(self, sessions: Sessions, session_id: str, owner: str) -> None:
        """Put question and answer into the session. An answer without text leaves no trace."""
        if not (text := self._tokens.text):
            return
        turn = [{"role": "user", "content": self._question}, {"role": "assistant", "content": text}]

        def change(session: Session) -> None:
            if session.version == self._version:
                session.messages = self._history + turn
                session.tokens = self._usage.prompt_tokens + self._usage.completion_tokens
            else:  # another connection has changed it meanwhile
                self._trim(session.messages)
                session.messages += turn
                session.tokens = 0
            self.messages = len(session.messages)

        await sessions.update(session_id, owner, change)

    def data(self, record: RequestRecord, finish_reason: str | None = None) -> dict[str, Any]:
        """Of a `message` or a `cancelled`."""
        return {
            "role": "assistant",
            "content": self._tokens.text,
            "reasoning": self._tokens.reasoning or None,
            "finish_reason": finish_reason or self._tokens.finish_reason,
            "usage": self._usage.body(),
            "model": record.model,
            "request_id": record.id,
            "seconds": round(time.perf_counter() - self._started, 6),
            "time_to_first_token": record.time_to_first_token,
            "messages": self.messages,
        }

    def _trim(self, history: list[dict[str, str]]) -> int:
        chat = self._settings.chat
        return within_limits(history, self._question, chat.max_history_messages, chat.max_history_bytes)

    def _prompt(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._history, {"role": "user", "content": self._question}]

    async def _count(self) -> int:
        """Tokens of the prompt as it is, by the model's own template and tokenizer."""
        prompt = self._prompt()
        body = {"model": self._models.resolve(self._request.model), "messages": prompt}
        answer = await self._generator.relay("count", body, history_bytes(prompt))
        assert isinstance(answer, dict)
        return int(answer["count"])

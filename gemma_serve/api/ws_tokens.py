"""An answer's text on its way to the client of a WebSocket chat."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from operator import itemgetter

from ..chat_protocol import token, token_head
from ..engine.base import Delta
from .ws_outbox import Outbox


class Tokens:
    """Sends `token`s, if they are wanted, and keeps the whole: the `Sink` of an answer's stream.

    What could not be sent at once goes together in one message.
    """

    def __init__(self, out: Outbox, message_id: str | None, wanted: bool) -> None:
        self._out = out
        self._wanted = wanted
        self._text_head = token_head(out.session_id, message_id)
        self._reasoning_head = token_head(out.session_id, message_id, "reasoning")
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._unsent: list[tuple[bytes, str]] = []
        self._begun = False
        self.finish_reason: str | None = None
        self.on_first: Callable[[], None] = lambda: None

    @property
    def text(self) -> str:
        """All that has come, sent or not."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    def put(self, delta: Delta) -> None:
        if not self._begun:
            self._begun = True
            self.on_first()
        text, reasoning = delta.text, ""
        if delta.delta is not None:
            text = delta.delta.get("content") or ""
            reasoning = delta.delta.get("reasoning") or delta.delta.get("reasoning_content") or ""
        if reasoning:
            self._reasoning.append(reasoning)
            self._keep(self._reasoning_head, reasoning)
        if text:
            self._text.append(text)
            self._keep(self._text_head, text)
        self.finish_reason = delta.finish_reason or self.finish_reason

    def put_texts(self, texts: list[str]) -> None:
        self.put(Delta(0, "".join(texts)))

    def _keep(self, head: bytes, text: str) -> None:
        if self._wanted:
            self._unsent.append((head, text))

    def flush(self) -> bool:
        # While the client does not read, joining all that waits for it at each step would hold up the others.
        if self._unsent and (self._out.waiting or not self._out.write(self._messages())):
            return False
        self._unsent.clear()
        return True

    async def drain(self) -> None:
        while self._unsent:
            messages = self._messages()
            self._unsent.clear()
            for message in messages:
                await self._out.send(message)

    def end(self) -> None:
        """Send no more: the engine may hold a flush back until after the message that ends the answer."""
        self._wanted = False
        self._unsent.clear()

    def _messages(self) -> list[bytes]:
        return [
            token(head, "".join(text for _, text in parts))
            for head, parts in groupby(self._unsent, itemgetter(0))
        ]

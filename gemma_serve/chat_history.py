"""What of a chat's history fits into the prompt: the oldest messages are dropped when it is too long."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from .sessions import history_bytes

Messages = list[dict[str, str]]
_PER_MESSAGE = 16  # tokens that a chat template may put around one
_ANSWER = 512  # tokens kept free for an answer of which no length was said
_FILL = 0.75  # of the room, after messages were dropped: so not every question drops some, and the KV cache's
# prefix is of use for those in between


def pop_oldest(history: Messages, count: int) -> int:
    """Drop `count` messages, and answers whose question is gone. Returns how many went."""
    while count < len(history) and history[count]["role"] != "user":
        count += 1
    del history[:count]
    return count


def within_limits(history: Messages, question: str, most_messages: int, most_bytes: int) -> int:
    """Drop the oldest messages until a question and its answer have room too. Returns how many went."""
    excess = max(0, len(history) + 2 - most_messages)
    left = history_bytes(history[excess:]) + len(question.encode()) - most_bytes
    while left > 0 and excess < len(history):
        left -= len(history[excess]["content"].encode())
        excess += 1
    return pop_oldest(history, excess) if excess else 0


async def within_context(
    history: Messages,
    prompt_bound: int,
    answer: int | None,
    context: int,
    count: Callable[[], Awaitable[int]],
) -> int:
    """Drop the oldest messages until the prompt leaves room for the answer. Returns how many went.

    `prompt_bound` is what the prompt has at most, in tokens: only when that is too much is it counted, which
    `count` does for the history as it is then. `answer` is how long the answer may be.
    """
    room = context - min(answer or _ANSWER, context // 4)
    if prompt_bound <= room or (tokens := await count()) <= room:
        return 0
    dropped = 0
    while tokens > room and history:
        excess = tokens - int(room * _FILL)
        share = tokens / max(1, sum(map(_weight, history)))
        number = 0
        while excess > 0 and number < len(history):
            excess -= max(1, int(_weight(history[number]) * share))
            number += 1
        dropped += pop_oldest(history, number)
        tokens = await count()
    return dropped


def _weight(message: dict[str, str]) -> int:
    return len(message["content"].encode()) + _PER_MESSAGE


def token_bound(*texts: str | None) -> int:
    """At most so many tokens are these messages: none is shorter than a byte."""
    return sum(len(text.encode()) + _PER_MESSAGE for text in texts if text is not None)

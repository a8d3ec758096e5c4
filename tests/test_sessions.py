"""Sessions: found by who may, gone when their time is over, shared through Redis, and going on without it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from gemma_serve.api_keys import digest_of
from gemma_serve.app import create_app
from gemma_serve.chat_history import within_context, within_limits
from gemma_serve.clients import Client, current_client
from gemma_serve.errors import InvalidRequest
from gemma_serve.key_file import KeyEntry, write_keys
from gemma_serve.sessions import Session, SessionNotFound, Sessions
from gemma_serve.settings import ChatSettings, StorageSettings
from gemma_serve.storage import SharedStorage, StorageAway

from .chat_client import app_of, chatting
from .conftest import forgetful_redis, running_redis, serving, until
from .fake_engine import FakeEngine
from .test_app import settings

ALICE, BOB = "sk-sessions-alice-0123456789", "sk-sessions-bob-0123456789"
ASKED = [{"role": "user", "content": "Hi"}]


@pytest.fixture(params=["memory", "redis"])
def storage(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Everything holds in memory as in Redis."""
    url = None if request.param == "memory" else str(request.getfixturevalue("redis_server"))
    return {"url": url, "prefix": f"test-{uuid.uuid4().hex[:8]}", "timeout_seconds": 10}


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def open_sessions(storage: dict[str, Any], stack: AsyncExitStack, **chat: Any) -> Sessions:
    shared = None
    if storage["url"]:
        shared = SharedStorage(StorageSettings(**storage))
        stack.push_async_callback(shared.aclose)
    return Sessions(ChatSettings(**chat), shared)


async def test_a_session_belongs_to_its_key(storage: dict[str, Any], stack: AsyncExitStack) -> None:
    sessions = open_sessions(storage, stack)
    name = sessions.new_id()
    await sessions.edit(name, "alice", system="x", messages=ASKED)
    found = await sessions.resume(name, "alice")
    assert (found.system, found.messages) == ("x", ASKED)
    for other, owner in ((name, "bob"), (name, ""), (sessions.new_id(), "alice"), ("x" * 100_000, "alice")):
        with pytest.raises(SessionNotFound):
            await sessions.resume(other, owner)


async def test_ids_cannot_be_guessed() -> None:
    assert len({Sessions.new_id() for _ in range(1000)}) == 1000
    assert all(len(Sessions.new_id()) == 32 for _ in range(100))  # 192 bits


async def test_a_session_ends_some_time_after_its_last_use(
    storage: dict[str, Any], stack: AsyncExitStack
) -> None:
    sessions = open_sessions(storage, stack, session_ttl_seconds=1)
    name = sessions.new_id()
    await sessions.edit(name, "", messages=ASKED)
    begun = used = time.monotonic()
    while used < begun + 1.6:  # each use begins its time anew
        await asyncio.sleep(0.1)
        asked = time.monotonic()
        found = await sessions.find(name, "")
        if time.monotonic() - used > 0.9:  # the machine had other things to do: once more
            await sessions.edit(name, "", messages=ASKED)
            begun = asked = time.monotonic()
        else:
            assert found is not None
        used = asked
    await asyncio.sleep(1.1)  # asking sooner would keep it
    assert await sessions.find(name, "") is None


async def test_too_large_a_history_is_refused(storage: dict[str, Any], stack: AsyncExitStack) -> None:
    sessions = open_sessions(storage, stack, max_history_bytes=1_000, max_history_messages=10)
    name = sessions.new_id()
    for system, messages in (
        (None, ASKED * 11),
        ("x" * 2_000, []),
        (None, [ASKED[0] | {"content": "é" * 600}]),
    ):
        with pytest.raises(InvalidRequest, match="at most 10 messages and 1,000 bytes"):
            await sessions.edit(name, "", system=system, messages=messages)
    assert await sessions.find(name, "") is None


async def test_memory_is_bounded_and_the_least_used_go_first(
    storage: dict[str, Any], stack: AsyncExitStack
) -> None:
    limits = {"max_sessions_bytes": 1_000_000, "max_history_bytes": 100_000}
    sessions = open_sessions(storage, stack, **limits)
    names = [sessions.new_id() for _ in range(100)]
    for number, name in enumerate(names):
        current_client.set(Client(f"ip:192.0.2.{number}"))  # no client has many
        await sessions.edit(name, "", messages=[{"role": "user", "content": "x" * 20_000}])
        assert await sessions.find(names[0], "") is not None
    if storage["url"]:
        sessions = open_sessions(storage, stack, **limits)  # one that has none in its memory
    kept = [name for name in names if await sessions.find(name, "") is not None]
    assert 40 < len(kept) < 50
    assert kept == [names[0], *names[-len(kept) + 1 :]]


@pytest.mark.parametrize("lost", ["used", "sizes"])
async def test_sessions_outlive_what_a_full_redis_evicts(
    redis_server: str, stack: AsyncExitStack, lost: str
) -> None:
    storage = {"url": redis_server, "prefix": f"test-{uuid.uuid4().hex[:8]}", "timeout_seconds": 10}
    sessions = open_sessions(storage, stack, max_sessions_bytes=1_000_000, max_history_bytes=100_000)

    async def write(count: int) -> list[str]:
        names = [sessions.new_id() for _ in range(count)]
        for name in names:
            await sessions.edit(name, "", messages=[{"role": "user", "content": "x" * 20_000}])
        return names

    await write(60)
    assert await sessions._redis.delete(f"{storage['prefix']}:all_sessions:{lost}")
    names = await write(60)
    kept = [name for name in names if await sessions._fetch(name) is not None]
    assert 40 < len(kept) < 50 and kept == names[-len(kept) :]
    sizes = await sessions._redis.hgetall(f"{storage['prefix']}:all_sessions:sizes")
    assert int(sizes.pop(b"")) == sum(map(int, sizes.values())) <= 1_000_000


async def test_a_client_keeps_so_many_and_those_used_last(
    storage: dict[str, Any], stack: AsyncExitStack
) -> None:
    sessions = open_sessions(storage, stack, max_sessions_per_client=3)

    async def kept(names: list[str], client: str) -> list[int]:
        current_client.set(Client("ip:192.0.2.9"))  # who has no part in them: to look is not to use
        return [at for at, name in enumerate(names) if await sessions.find(name, client) is not None]

    async def write(client: str, name: str) -> None:
        current_client.set(Client(f"key:{client}", key=client))
        await sessions.edit(name, client, messages=ASKED)

    names, others = ([sessions.new_id() for _ in range(5)] for _ in range(2))
    for name in others[:3]:
        await write("bob", name)
    for name in names[:3]:
        await write("alice", name)
    assert await sessions.find(names[0], "alice") is not None  # used again, so the next goes before it
    await write("alice", names[3])
    assert await kept(names, "alice") == [0, 2, 3]
    await write("alice", names[4])
    assert await kept(names, "alice") == [0, 3, 4]
    assert await kept(others, "bob") == [0, 1, 2]


async def test_changes_of_two_connections_are_both_kept(
    storage: dict[str, Any], stack: AsyncExitStack
) -> None:
    servers = [open_sessions(storage, stack)] * 2
    if storage["url"]:
        servers = [open_sessions(storage, stack) for _ in range(2)]
    name = Sessions.new_id()

    async def add(number: int) -> None:
        def change(session: Session) -> None:
            session.messages.append({"role": "user", "content": str(number)})

        await servers[number % 2].update(name, "", change)

    for first in range(0, 12, 3):
        await asyncio.gather(*(add(number) for number in range(first, first + 3)))
    for server in servers:
        session = await server.find(name, "")
        assert session is not None
        assert sorted(int(message["content"]) for message in session.messages) == list(range(12))


async def test_a_turn_is_kept_once_when_redis_is_asked_twice(tmp_path: Path, stack: AsyncExitStack) -> None:
    async with forgetful_redis(tmp_path) as redis:
        sessions = open_sessions({"url": redis.url, "timeout_seconds": 10}, stack)
        name = sessions.new_id()
        for _ in range(3):
            async with redis.loses_an_answer():
                await sessions.update(name, "", lambda session: session.messages.extend(ASKED))
        assert (await sessions.resume(name, "")).messages == ASKED * 3
        await stack.aclose()


async def test_many_connections_together_do_not_outgrow_the_limits(stack: AsyncExitStack) -> None:
    engine = FakeEngine(hang_at=1)
    app = app_of(engine, chat={"max_history_messages": 4, "max_history_bytes": 2000})
    url = await stack.enter_async_context(serving(app))
    chats = [await stack.enter_async_context(chatting(url)) for _ in range(8)]
    await chats[0].ask("load", messages=[*ASKED, {"role": "assistant", "content": "Hello"}])
    for chat in chats[1:]:
        await chat.ask("session", session_id=chats[0].session_id)
    for chat in chats:
        await chat.send("chat", message="x" * 900)
    await until(lambda: engine.hanging == len(chats))
    engine.go_on.set()
    for chat in chats:
        assert (await chat.replies())[-1]["data"]["messages"] <= 4
    assert len(await chats[0].history()) == 4


async def test_while_redis_is_away(tmp_path: Path, stack: AsyncExitStack) -> None:
    path = tmp_path / "socket"
    storage = {"url": f"unix://{path}", "timeout_seconds": 10}
    with running_redis(path):
        server, other = (open_sessions(storage, stack) for _ in range(2))
        strict = open_sessions(storage | {"fail_open": False}, stack)
        name = Sessions.new_id()
        for one in (server, strict):
            await one.edit(name, "", messages=ASKED)
    changed = await server.edit(name, "", messages=ASKED * 3)  # goes on where it was used last
    assert len(changed.messages) == 3
    for one in (other, strict):
        with pytest.raises(StorageAway):
            await one.resume(name, "")
    with running_redis(path):  # empty: it kept nothing
        async with asyncio.timeout(20):
            while True:
                session = await server.find(name, "")
                assert session is not None and len(session.messages) == 3
                try:
                    await server.update(name, "", lambda session: None)
                    assert len((await other.resume(name, "")).messages) == 3
                    break
                except (StorageAway, SessionNotFound):
                    await asyncio.sleep(0.1)  # it is asked again after a pause


async def test_a_session_goes_on_at_another_server_and_with_no_other_key(
    tmp_path: Path, storage: dict[str, Any]
) -> None:
    keys = tmp_path / "keys.yaml"
    write_keys(
        keys,
        [
            KeyEntry(name="alice", sha256=digest_of(ALICE).hex()),
            KeyEntry(name="bob", sha256=digest_of(BOB).hex()),
        ],
    )
    security = {"api_keys_file": keys, "api_key_required": False}
    apps = [create_app(settings(storage=storage, security=security), FakeEngine()) for _ in range(2)]
    async with serving(apps[0]) as first, serving(apps[1]) as second:
        there = second if storage["url"] else first
        async with chatting(first, ALICE) as chat:
            await chat.ask("chat", message="A secret")
        for key in (BOB, None):
            async with chatting(there, key) as chat_of_other:
                mine = chat_of_other.session_id
                theirs = await chat_of_other.ask("session", session_id=chat.session_id)
                nowhere = await chat_of_other.ask("session", session_id=Sessions.new_id())
                assert theirs["data"] == nowhere["data"]  # nothing tells that it exists
                assert (theirs["data"]["code"], theirs["data"]["status"]) == ("session_not_found", 404)
                assert theirs["session_id"] == mine
                assert await chat_of_other.history() == []
        async with chatting(there, ALICE) as again:
            await again.ask("session", session_id=chat.session_id)
            await again.ask("chat", message="More")
            assert [text for _, text in await again.history()][::2] == ["A secret", "More"]


async def test_a_session_that_expired_meanwhile_is_told() -> None:
    app = create_app(settings(chat={"session_ttl_seconds": 1}), FakeEngine())
    async with serving(app) as url, chatting(url) as chat:
        await chat.ask("chat", message="Hi")
        await asyncio.sleep(1.1)
        await chat.send("chat", message="Still there?")
        replies = await chat.replies()
        assert (replies[0]["type"], replies[0]["data"]) == ("trimmed", {"dropped": 2, "messages": 0})
        assert replies[-1]["data"]["messages"] == 2


# --- what of a history fits


def history(turns: int, size: int = 100) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": str(n).ljust(size)} for n in range(2 * turns)]


@pytest.mark.parametrize("most", [2, 3, 10, 11, 50])
def test_a_limit_of_messages_drops_whole_turns(most: int) -> None:
    messages = history(20)
    dropped = within_limits(messages, "?", most, 10**6)
    assert dropped == 40 - len(messages)
    assert len(messages) + 2 <= most or not messages
    assert not messages or messages[0]["role"] == "user"
    assert len(messages) >= min(40, most - 2) - 1


def test_a_limit_of_bytes_counts_the_question() -> None:
    messages = history(10)
    assert within_limits(messages, "?" * 500, 1000, 1_500) == 10
    assert messages == history(10)[10:]
    assert within_limits(messages, "?" * 5_000, 1000, 1_500) == 10
    assert not messages


async def test_only_what_may_be_too_long_is_counted() -> None:
    async def never() -> int:
        raise AssertionError("it fits by any count")

    assert await within_context(history(3), 700, 100, 1000, never) == 0


@pytest.mark.parametrize("per_token", [1, 3, 4.5])
@pytest.mark.parametrize("size", [3, 100, 900])
async def test_the_oldest_turns_go_until_the_answer_has_room(per_token: float, size: int) -> None:
    messages, counted = history(200, size), 0

    async def count() -> int:
        nonlocal counted
        counted += 1
        return 20 + int(sum(5 + len(one["content"]) / per_token for one in messages))

    before = await count()
    dropped = await within_context(messages, 10**9, 200, 1000, count)
    assert await count() <= 800
    assert dropped == 400 - len(messages)
    if dropped:
        assert before > 800
        assert messages == history(200, size)[dropped:]
        if messages:
            assert messages[0]["role"] == "user"
        # No more than needed, and some: the next question must not drop again.
        assert await count() > 300 or size >= 900
    assert counted < 10

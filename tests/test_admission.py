"""The queue before the engine: bounded, fair, and exact in its counts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from gemma_serve.admission import Admission, Slot
from gemma_serve.clients import Client, current_client
from gemma_serve.engine.base import RelayKind
from gemma_serve.engine.switch import EngineSwitch
from gemma_serve.errors import Overloaded
from gemma_serve.generation import Generator
from gemma_serve.metrics import Metrics
from gemma_serve.models import Models
from gemma_serve.settings import QueueSettings, Settings

from .fake_engine import FakeEngine


def queue(capacity: int = 1, **settings: float) -> Admission:
    return Admission(QueueSettings(**settings), lambda: capacity)


async def wait_in(admission: Admission, name: str, order: list[str], **client: float) -> None:
    slot = await admission.enter(1000, client=Client(name, **client))  # type: ignore[arg-type]
    order.append(name)
    slot.leave()


async def served_order(admission: Admission, clients: list[tuple[str, dict[str, float]]]) -> list[str]:
    """In which order clients that arrive one after the other get the only place."""
    order: list[str] = []
    first = await admission.enter(0)
    waiters = []
    for name, client in clients:
        waiters.append(asyncio.create_task(wait_in(admission, name, order, **client)))
        await asyncio.sleep(0)
    assert admission.waiting == len(clients)
    first.leave()
    await asyncio.gather(*waiters)
    assert (admission.running, admission.waiting) == (0, 0)
    return order


async def test_one_clients_burst_delays_only_itself() -> None:
    burst: list[tuple[str, dict[str, float]]] = [("burst", {}) for _ in range(20)]
    order = await served_order(queue(), [*burst, ("other", {}), ("third", {})])
    assert {order.index("other"), order.index("third")} == {1, 2}


async def test_weights_are_shares() -> None:
    clients: list[tuple[str, dict[str, float]]] = [("light", {"weight": 1}) for _ in range(30)]
    clients += [("heavy", {"weight": 3}) for _ in range(30)]
    assert (await served_order(queue(), clients))[:20].count("heavy") == 15


async def test_a_higher_class_goes_first() -> None:
    clients: list[tuple[str, dict[str, float]]] = [("batch", {"priority": 10}) for _ in range(5)]
    assert (await served_order(queue(), [*clients, ("person", {"priority": 0})]))[0] == "person"


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    admission = queue(max_requests=2)
    first = await admission.enter(0)
    waiters = [asyncio.create_task(admission.enter(0)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        admission.require_room()
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
    with pytest.raises(Overloaded):
        await admission.enter(0)
    first.leave()
    for waiter in waiters:
        (await waiter).leave()
    admission.require_room()


async def test_the_queue_is_bounded_in_tokens() -> None:
    admission = queue(max_tokens=1000)
    first = await admission.enter(10**9)  # no queue, no limit: the engine itself says what is too long
    waiter = asyncio.create_task(admission.enter(3000))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="750 tokens"):
        admission.require_room(2000)
    admission.require_room(400)
    first.leave()
    (await waiter).leave()


async def test_nobody_waits_for_ever() -> None:
    admission = queue(wait_seconds=0.01)
    first = await admission.enter(0)
    with pytest.raises(Overloaded, match=r"0\.01 s"):
        await admission.enter(0)
    assert admission.waiting == 0
    first.leave()
    assert admission.running == 0


async def test_no_place_is_left_empty_for_one_who_wants_many() -> None:
    admission = queue(capacity=4)
    first = await admission.enter(0, answers=3)
    async with asyncio.timeout(5):
        large = await admission.enter(0, answers=10)  # the engine has a place for one of the ten
    waiting = [asyncio.create_task(admission.enter(0, answers=answers)) for answers in (8, 1)]
    await asyncio.sleep(0)
    first.leave()
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)  # all places are taken
    large.leave()
    (await waiting[0]).leave()
    (await waiting[1]).leave()
    assert (admission.running, admission.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("kind", "given", "places"),
    [
        ("embeddings", ["a", "b", "c"], 3),
        ("embeddings", [[1, 2], [3]], 2),
        ("embeddings", [1, 2, 3], 1),
        ("embeddings", "abc", 1),
        ("responses", [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], 1),
    ],
)
async def test_each_text_to_embed_has_a_place(kind: RelayKind, given: Any, places: int) -> None:
    class Engine(FakeEngine):
        async def relay(
            self, kind: RelayKind, body: dict[str, Any]
        ) -> dict[str, Any] | AsyncGenerator[bytes, None]:
            assert admission.running == places
            return await super().relay(kind, body)

    admission = queue(capacity=8)
    engine = Engine()
    settings = Settings(model={"name": "gemma-demo"})
    models = Models(settings, EngineSwitch(settings, lambda _: engine))
    await engine.start()
    body = {"model": "gemma-demo", "input": given}
    await Generator(engine, models, admission, Metrics()).relay(kind, body, 9)
    assert admission.running == 0


async def test_one_clients_long_texts_do_not_keep_anothers_from_the_tokenizer() -> None:
    begun: list[str] = []
    go_on = asyncio.Semaphore(0)

    class Engine(FakeEngine):
        async def relay(
            self, kind: RelayKind, body: dict[str, Any]
        ) -> dict[str, Any] | AsyncGenerator[bytes, None]:
            begun.append(body["prompt"])
            await go_on.acquire()
            return {}

    engine = Engine()
    settings = Settings(model={"name": "gemma-demo"})
    models = Models(settings, EngineSwitch(settings, lambda _: engine))
    await engine.start()
    generator = Generator(engine, models, queue(), Metrics())

    async def tokenize(name: str) -> None:
        current_client.set(Client(f"key:{name}"))
        await generator.relay("tokenize", {"model": "gemma-demo", "prompt": name}, 100_000)

    tasks = [asyncio.create_task(tokenize("flood")) for _ in range(40)]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(tokenize("other")))
    await asyncio.sleep(0)
    assert 0 < len(begun) < 10
    for _ in tasks:
        go_on.release()
    await asyncio.gather(*tasks)
    assert len(begun) == 41 and begun.index("other") < 10


@pytest.mark.parametrize("seed", range(20))
async def test_clients_that_leave_at_any_moment_leave_no_trace(seed: int) -> None:
    chance = random.Random(seed)
    admission = queue(capacity=5, wait_seconds=0.02)
    most = 0

    async def client(number: int) -> None:
        nonlocal most
        slot: Slot | None = None
        try:
            slot = await admission.enter(
                chance.randrange(5000), chance.randrange(1, 4), Client(str(number % 7))
            )
            most = max(most, admission.running)
            await asyncio.sleep(chance.random() / 500)
        except Overloaded:
            pass
        finally:
            if slot is not None:
                slot.leave()
                slot.leave()

    clients = [asyncio.create_task(client(number)) for number in range(200)]
    for task in chance.sample(clients, 80):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    assert (admission.running, admission.waiting, admission._waiting_tokens) == (0, 0, 0)
    assert 0 < most < 5 + 3  # the last to come in may want up to three places


async def test_many_clients_under_a_queue_that_never_empties_are_forgotten() -> None:
    admission = queue()
    slot = await admission.enter(0)
    waiters: list[asyncio.Task[Slot]] = []
    for number in range(5000):
        waiters.append(asyncio.create_task(admission.enter(0, client=Client(f"ip:{number}"))))
        await asyncio.sleep(0)
        if len(waiters) > 2:
            slot.leave()
            slot = await waiters.pop(0)
    assert len(admission._last_tag) < 5000
    for waiter in waiters:
        slot.leave()
        slot = await waiter
    slot.leave()
    assert (admission.running, admission.waiting) == (0, 0)

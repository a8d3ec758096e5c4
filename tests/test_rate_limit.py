"""Limits: who takes more than their share is told when to come back, and everything taken is given back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import websockets
from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from gemma_serve.api_keys import digest_of
from gemma_serve.app import create_app
from gemma_serve.clients import Client, Quotas
from gemma_serve.errors import RateLimited
from gemma_serve.key_file import KeyEntry, KeyLimits, write_keys
from gemma_serve.rate_limit import RateLimiter, quotas, redis_quotas
from gemma_serve.rate_limit.limiter import duration
from gemma_serve.rate_limit.window import MemoryWindows
from gemma_serve.settings import Settings
from gemma_serve.storage import SharedStorage, StorageAway
from gemma_serve.token_usage import estimate_tokens

from .conftest import forgetful_redis, running_redis, serving, start_fake, until
from .fake_engine import FakeEngine
from .test_api_keys import bearer
from .test_app import CHAT
from .test_cli import run

KEY, OTHER = "sk-limited-0123456789", "sk-another-0123456789"


def settings(storage: str | None = None, **security: Any) -> Settings:
    return Settings(
        model={"name": "gemma-demo"},
        security=security,
        storage={"url": storage, "prefix": f"test-{uuid.uuid4().hex[:8]}", "timeout_seconds": 10},
    )


def find_limiter(app: Any) -> RateLimiter:
    (item,) = [item for item in app.user_middleware if item.cls.__name__ == "RateLimit"]
    limiter: RateLimiter = item.kwargs["limiter"]
    return limiter


@pytest.fixture(params=["memory", "redis"])
def storage(request: pytest.FixtureRequest) -> str | None:
    """Everything holds in memory as in Redis."""
    return None if request.param == "memory" else str(request.getfixturevalue("redis_server"))


@pytest.fixture
async def limiter(storage: str | None) -> AsyncIterator[RateLimiter]:
    async with AsyncExitStack() as stack:
        shared = None
        if storage:
            shared = SharedStorage(settings(storage).storage)
            stack.push_async_callback(shared.aclose)
        limiter = RateLimiter(settings(storage), shared)
        yield await stack.enter_async_context(_running(limiter))


def _running(limiter: RateLimiter) -> Any:
    class Running:
        async def __aenter__(self) -> RateLimiter:
            self.context = limiter.running()
            await self.context.__aenter__()
            return limiter

        async def __aexit__(self, *error: Any) -> None:
            await self.context.__aexit__(*error)

    return Running()


def client(**quotas: int) -> Client:
    return Client("key:a", "a", quotas=Quotas(**quotas))


async def test_the_window_in_memory_counts_as_the_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    theirs, ours = SlidingWindowCounterRateLimiter(MemoryStorage()), MemoryWindows(60, lambda: now)
    item, rng = RateLimitItemPerSecond(20, 60), random.Random(5)
    refused = 0
    for _ in range(5_000):
        now += rng.choice((0.0, 0.01, 0.5, 1.0, 2.0, 5.0, 130.0)) * rng.random()
        admitted = await theirs.hit(item, "a")
        reset, remaining = await theirs.get_window_stats(item, "a")
        window = ours.hit("a", 20)
        assert window.admitted == admitted
        assert window.remaining == (remaining if admitted else 0)
        assert window.reset == pytest.approx(reset - now, abs=1e-5)
        refused += not admitted
    assert 500 < refused < 4_500


async def test_requests_in_a_window(storage: str | None) -> None:
    app = create_app(settings(storage, rate_limit_per_minute=3), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        for left in (2, 1, 0):
            answer = await http.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-limit-requests"] == "3"
            assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
            assert answer.headers["x-ratelimit-reset-requests"]
        answer = await http.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert answer.json()["error"]["type"] == "requests"
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert answer.headers["x-request-id"]
        anthropic = await http.post("/v1/messages", json={})
        assert (anthropic.status_code, anthropic.json()["error"]["type"]) == (429, "rate_limit_error")
        for path in ("/health/live", "/health/ready", "/health", "/docs"):
            for _ in range(5):
                answer = await http.get(path)
                assert answer.status_code == 200
                assert "x-ratelimit-limit-requests" not in answer.headers


async def test_the_openai_client_comes_back_by_itself() -> None:
    app = create_app(settings(rate_limit_per_minute=60, rate_limit_window_seconds=1), FakeEngine())
    async with (
        serving(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=5) as api,
    ):
        for _ in range(50):  # a second may begin between two
            raw = await api.models.with_raw_response.list()
            if raw.retries_taken:
                break
        assert raw.retries_taken


async def test_requests_in_flight(storage: str | None) -> None:
    engine = FakeEngine(hang_at=0)
    app = create_app(settings(storage, max_in_flight=1), engine)
    limiter = find_limiter(app)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        for stream in (False, True):
            engine.hanging = 0
            first = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT | {"stream": stream}))
            await until(lambda: engine.hanging == 1)
            answer = await http.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
            first.cancel()
            await until(lambda: limiter.in_flight() == 0)
        engine.hang_at = None
        for _ in range(20):  # one after the other, each at once
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_tokens_are_reserved_and_put_right(limiter: RateLimiter) -> None:
    who = client(tokens_per_minute=1000)
    lease = await limiter.admit(who)
    await lease.reserve(900)
    assert lease.tokens_left == pytest.approx(100, abs=20)
    second = await limiter.admit(who)
    with pytest.raises(RateLimited, match="tokens: 1,000 per minute, requested 500") as refused:
        await second.reserve(500)
    assert 15 <= int(refused.value.headers["Retry-After"]) <= 25
    await second.settle(None, None)
    await lease.settle(100, 200)
    third = await limiter.admit(who)
    assert third.tokens_left is not None and 690 <= third.tokens_left < 900  # 16.7 come back each second
    await third.reserve(10)
    await third.settle(500, 700)  # more than was thought: a debt
    fourth = await limiter.admit(who)
    assert fourth.tokens_left is not None and fourth.tokens_left < -400
    await fourth.settle(None, None)
    with pytest.raises(RateLimited, match="too large") as refused:
        await fourth.reserve(1001)
    assert refused.value.headers == {"x-should-retry": "false"}
    assert limiter.in_flight() == 0


async def test_who_leaves_while_he_is_admitted_keeps_no_slot(limiter: RateLimiter) -> None:
    who = client(in_flight=1)
    for rounds in range(12):  # wherever it waits
        admitting = asyncio.create_task(limiter.admit(who))
        for _ in range(rounds):
            await asyncio.sleep(0)
        admitting.cancel()
        (lease,) = await asyncio.gather(admitting, return_exceptions=True)
        if not isinstance(lease, BaseException):
            await lease.settle(None, None)
        await until(lambda: not limiter._settling)
        lease = await limiter.admit(who)
        await lease.settle(None, None)


async def test_a_request_counts_on_the_day_it_was_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    limiter, who = RateLimiter(settings()), client(tokens_per_day=1000)
    lease = await limiter.admit(who)
    monkeypatch.setattr(quotas, "today", lambda: lease.day + 1)
    await lease.reserve(800)
    await lease.settle(10, 10)
    again = await limiter.admit(who)
    await again.reserve(1000)


async def test_a_first_limit_begins_with_all_its_tokens() -> None:
    limiter = RateLimiter(settings())
    before, after = client(), client(tokens_per_minute=6000)
    old, older = await limiter.admit(before), await limiter.admit(before)
    await old.settle(0, 0)
    new = await limiter.admit(after)
    await new.reserve(3000)
    await older.settle(0, 0)
    await (await limiter.admit(after)).reserve(2900)


async def test_a_burst_is_not_taken_for_a_redis_that_is_away(redis_server: str) -> None:
    """It takes its connections one after the other for longer than one call may."""
    storage = SharedStorage(settings(redis_server).storage.model_copy(update={"timeout_seconds": 2.0}))

    async def work() -> None:
        await storage.redis.blpop(f"nothing-{uuid.uuid4().hex}", timeout=0.2)

    begun = time.monotonic()
    await asyncio.gather(*(storage.call(work) for _ in range(64 * 15)))
    assert time.monotonic() - begun > 2.0 and not storage.away
    await storage.aclose()


async def test_tokens_of_a_day(limiter: RateLimiter) -> None:
    who = client(tokens_per_day=1000)
    lease = await limiter.admit(who)
    await lease.reserve(600)
    second = await limiter.admit(who)
    with pytest.raises(RateLimited, match="per day"):
        await second.reserve(600)
    await lease.settle(100, 0)
    await second.reserve(600)
    await second.settle(None, None)
    assert sum(row.prompt_tokens + row.completion_tokens for row in await limiter.usage(1)) == 100


async def test_no_more_than_the_limit_at_the_same_time(limiter: RateLimiter) -> None:
    who = client(in_flight=5, requests_per_minute=50)
    results = await asyncio.gather(*(limiter.admit(who) for _ in range(100)), return_exceptions=True)
    leases = [result for result in results if not isinstance(result, BaseException)]
    assert len(leases) == 5
    assert all(isinstance(result, RateLimited) for result in results if isinstance(result, BaseException))
    await asyncio.gather(*(lease.settle(1, 1) for lease in leases for _ in range(2)))
    assert limiter.in_flight() == 0
    assert [row.requests for row in await limiter.usage(1)] == [5]


async def test_headers_and_corrections_over_http(storage: str | None) -> None:
    engine = FakeEngine()
    app = create_app(settings(storage, tokens_per_minute=1000), engine)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        body = CHAT | {"max_tokens": 400}
        answer = await http.post("/v1/chat/completions", json=body)
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
        assert 500 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 620
        for stream in (False, True):  # 5 tokens each by the fake engine's count
            await http.post("/v1/chat/completions", json=body | {"stream": stream})
        engine.fail_at = 0
        for _ in range(5):  # a request that fails costs nothing
            answer = await http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 500
        answer = await http.get("/v1/models")
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) > 980
        answer = await http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 2000})
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "tokens")
        assert answer.headers["x-should-retry"] == "false"


async def test_relayed_apis_are_counted_too() -> None:
    engine = FakeEngine(usage={"input_tokens": 200, "output_tokens": 100})
    app = create_app(settings(tokens_per_minute=1000), engine)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        for path, body in (
            ("/v1/responses", {"input": "x", "max_output_tokens": 500}),
            ("/v1/messages", {"messages": [], "max_tokens": 500}),
            ("/v1/messages", {"messages": [], "max_tokens": 100, "stream": True}),
        ):
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
        rows = (await http.get("/v1/usage")).json()["data"]
        assert rows[0]["prompt_tokens"] == 600 and rows[0]["completion_tokens"] == 300
        assert 90 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 1000
        answer = await http.post("/v1/responses", json={"input": "x", "max_output_tokens": 500})
        assert answer.status_code == 429
        answer = await http.post("/v1/messages/count_tokens", json={"messages": []})
        assert answer.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "usage"),
    [
        ("messages", {"input_tokens": 20, "cache_read_input_tokens": 150, "cache_creation_input_tokens": 30}),
        (
            "messages",
            {"input_tokens": 50, "cache_read_input_tokens": 150, "cache_creation_input_tokens": None},
        ),
        ("responses", {"input_tokens": 200, "input_tokens_details": {"cached_tokens": 150}}),
    ],
)
async def test_what_was_cached_of_a_prompt_counts(path: str, usage: dict[str, Any], stream: bool) -> None:
    app = create_app(settings(), FakeEngine(usage=usage | {"output_tokens": 100}))
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        body = {"input": "x"} if path == "responses" else {"messages": [], "max_tokens": 500}
        answer = await http.post(f"/v1/{path}", json=body | {"stream": stream})
        assert answer.status_code == 200, answer.text
        (row,) = (await http.get("/v1/usage")).json()["data"]
        assert (row["prompt_tokens"], row["completion_tokens"]) == (200, 100)


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ({"max_tokens": 10}, 10),
        ({"max_tokens": 10, "n": 3}, 30),
        ({"prompt": ["a", "b"], "max_tokens": 10, "n": 3}, 60),
        ({"prompt": [1, 2, 3], "max_tokens": 10}, 10),
        ({"max_output_tokens": 500, "max_completion_tokens": 1}, 500),  # which /v1/responses ignores
        ({"max_output_tokens": 10, "n": -1_000_000}, 10),
    ],
)
def test_what_an_answer_may_take(body: dict[str, Any], answer: int) -> None:
    assert estimate_tokens(body)[1] == answer


async def test_each_key_has_its_own(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    own = KeyLimits(requests_per_minute=2)
    write_keys(
        file,
        [
            KeyEntry(name="one", sha256=digest_of(KEY).hex(), limits=own),
            KeyEntry(name="two", sha256=digest_of(OTHER).hex()),
        ],
    )
    app = create_app(settings(api_keys_file=file, rate_limit_per_minute=4), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        for key, limit in ((KEY, 2), (OTHER, 4)):
            statuses = [(await http.get("/v1/models", headers=bearer(key))).status_code for _ in range(6)]
            assert statuses == [200] * limit + [429] * (6 - limit)
        assert (await http.get("/v1/models")).status_code == 401


async def test_addresses_are_believed_from_proxies_only() -> None:
    for proxies, others in ((["127.0.0.0/8"], 200), ([], 429)):
        app = create_app(settings(trusted_proxies=proxies, rate_limit_per_minute=1), FakeEngine())
        async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
            first = {"X-Forwarded-For": "198.51.100.1, 203.0.113.1"}
            assert (await http.get("/v1/models", headers=first)).status_code == 200
            # The left of the list is the client's to invent; the right is the proxy's word.
            assert (
                await http.get("/v1/models", headers={"X-Forwarded-For": "9.9.9.9, 203.0.113.1"})
            ).status_code == 429
            assert (
                await http.get("/v1/models", headers={"X-Forwarded-For": "203.0.113.2"})
            ).status_code == others


async def test_an_ipv6_network_is_one_client() -> None:
    app = create_app(settings(trusted_proxies=["127.0.0.1"], rate_limit_per_minute=1), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        statuses = [
            (await http.get("/v1/models", headers={"X-Forwarded-For": address})).status_code
            for address in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "::ffff:192.0.2.1", "192.0.2.1")
        ]
    assert statuses == [200, 429, 200, 200, 429]


async def test_websockets_are_limited() -> None:
    app = create_app(settings(rate_limit_per_minute=1, max_in_flight=1), FakeEngine())
    async with serving(app) as url:
        ws = url.replace("http", "ws") + "/ws"
        async with websockets.connect(ws) as socket:
            await socket.recv()
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(ws)
        assert refused.value.response.status_code == 429
        assert refused.value.response.headers["retry-after"]
    assert find_limiter(app).in_flight() == 0


async def test_usage_by_key_and_day(tmp_path: Path, storage: str | None) -> None:
    file = tmp_path / "keys.yaml"
    write_keys(
        file,
        [
            KeyEntry(name="one", sha256=digest_of(KEY).hex()),
            KeyEntry(name="ops", sha256=digest_of(OTHER).hex(), scopes=("admin",)),
        ],
    )
    app = create_app(settings(storage, api_keys_file=file), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        for _ in range(2):
            await http.post("/v1/chat/completions", json=CHAT, headers=bearer(KEY))
        own = (await http.get("/v1/usage", headers=bearer(KEY))).json()
        (row,) = own["data"]
        assert row == {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "key": "one",
            "requests": 2,
            "prompt_tokens": 6,
            "completion_tokens": 4,
        }
        assert (await http.get("/admin/usage", headers=bearer(KEY))).status_code == 403
        everyone = (await http.get("/admin/usage", headers=bearer(OTHER))).json()["data"]
        assert {row["key"] for row in everyone} == {"one"}
        assert (await http.get("/v1/usage?days=0", headers=bearer(KEY))).status_code == 400
        shown = await asyncio.to_thread(run, "keys", "usage", "--url", url, environ={"OPENAI_API_KEY": OTHER})
        assert shown.returncode == 0, shown.stderr
        assert "one" in shown.stdout and "PROMPT TOKENS" in shown.stdout
        refused = await asyncio.to_thread(run, "keys", "usage", "--url", url, environ={"OPENAI_API_KEY": KEY})
        assert refused.returncode == 1 and "answered 403" in refused.stderr


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_is_left_in_its_prefill_counts(stream: bool) -> None:
    app = create_app(settings(None, tokens_per_minute=1_000_000), FakeEngine(hang_at=0))
    headers = {"X-Request-Timeout": "0.2"}
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60, headers=headers) as http:
        answer = await http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
        assert answer.status_code == 504
    (row,) = await find_limiter(app).usage(1)
    assert row.prompt_tokens > 0


async def test_500_disconnects_leave_nothing_behind(storage: str | None) -> None:
    words = tuple(f" word{number}" for number in range(40))
    engine = FakeEngine(words, pause=0.002)
    config = settings(storage, tokens_per_minute=10_000_000, max_in_flight=1000)
    app = create_app(config, engine)
    limiter, seed = find_limiter(app), random.Random(5)
    async with serving(app) as url:
        slots = asyncio.Semaphore(50)

        async def leave_early(http: httpx.AsyncClient) -> None:
            stream, path = seed.random() < 0.7, seed.choice(("/v1/chat/completions", "/v1/completions"))
            body = CHAT if "chat" in path else {"prompt": "Hi"}
            async with slots:
                request = asyncio.create_task(http.post(path, json=body | {"stream": stream}))
                await asyncio.wait([request], timeout=seed.random() * 0.1)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)

        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            await asyncio.gather(*(leave_early(http) for _ in range(500)))
        await until(lambda: limiter.in_flight() == 0 and not limiter._settling, 30)
        anyone = Client("ip:127.0.0.1", quotas=replace(config.security.quotas, in_flight=1))
        lease = await limiter.admit(anyone)  # so none is held in the store either
        await lease.settle(None, None)
        assert lease.tokens_left is not None
    assert all(stream.closed for stream in engine.streams)


async def test_who_leaves_while_redis_is_asked_gets_his_tokens_back(tmp_path: Path) -> None:
    with running_redis(tmp_path / "socket") as storage:
        config = settings(storage, tokens_per_day=100_000)
        slow = config.model_copy(
            update={"storage": config.storage.model_copy(update={"timeout_seconds": 60.0})}
        )
        app = create_app(slow, FakeEngine())
        limiter = find_limiter(app)
        assert limiter._storage is not None
        redis = limiter._storage.redis
        process = (await redis.info("server"))["process_id"]
        async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
            before = await limiter.usage(1)
            reserve, asked = limiter._quotas.reserve, asyncio.Event()

            async def hung(*args: Any) -> Any:
                os.kill(process, signal.SIGSTOP)
                asked.set()
                return await reserve(*args)

            limiter._quotas.reserve = hung  # type: ignore[method-assign, assignment]
            request = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 5000}))
            await asked.wait()
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            await until(lambda: limiter.in_flight() == 0)
            os.kill(process, signal.SIGCONT)
            await until(lambda: not limiter._settling)
            limiter._quotas.reserve = reserve  # type: ignore[method-assign]
            left = CHAT | {"max_tokens": 99_900 - sum(day.prompt_tokens for day in before)}
            assert (await http.post("/v1/chat/completions", json=left)).status_code == 200


async def test_redis_away_and_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "socket"
    config = settings(f"unix://{path}", rate_limit_per_minute=1, max_in_flight=1, tokens_per_minute=1000)
    shut = config.model_copy(update={"storage": config.storage.model_copy(update={"fail_open": False})})
    async with (
        serving(create_app(config, FakeEngine())) as url,
        serving(create_app(shut, FakeEngine())) as closed_url,
        httpx.AsyncClient(base_url=url, timeout=60) as opened,
        httpx.AsyncClient(base_url=closed_url, timeout=60) as closed,
    ):
        for _ in range(20):
            assert (await opened.post("/v1/chat/completions", json=CHAT)).status_code == 200
            answer = await closed.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "storage_unavailable"
            assert (await closed.get("/health/ready")).status_code == 200
        assert len([record for record in caplog.records if "cannot be used" in record.message]) == 2
        with running_redis(path):
            seen: list[int] = []

            async def limited(http: httpx.AsyncClient) -> bool:
                seen.append((await http.get("/v1/models")).status_code)
                return seen[-1] == 429

            for http in (opened, closed):
                async with asyncio.timeout(20):
                    while not await limited(http):
                        await asyncio.sleep(0.05)


async def test_what_redis_is_asked_again_it_does_once(tmp_path: Path) -> None:
    async with forgetful_redis(tmp_path) as redis:
        config = settings(redis.url)
        storage = SharedStorage(config.storage)
        limiter, who = RateLimiter(config, storage), client(in_flight=1, tokens_per_day=1000)
        for _ in range(3):
            async with redis.loses_an_answer():
                lease = await limiter.admit(who)
            async with redis.loses_an_answer():
                await lease.reserve(600)
            async with redis.loses_an_answer():
                await lease.settle(30, 4)
        assert not storage.away
        (row,) = await limiter.usage(1)
        assert (row.requests, row.prompt_tokens, row.completion_tokens) == (3, 90, 12)
        await storage.aclose()


async def test_a_redis_that_hangs_does_not_hold_the_server_up(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_unix_server(lambda reader, writer: writers.append(writer), path)
    async with server:
        impatient = settings(f"unix://{path}").storage.model_copy(update={"timeout_seconds": 0.5})
        storage = SharedStorage(impatient)
        limiter = RateLimiter(settings(), storage)
        for _ in range(50):
            lease = await limiter.admit(client(requests_per_minute=1, in_flight=1))
            await lease.settle(1, 1)
        assert len(writers) < 10, "most requests have to go on without asking it"
        with pytest.raises(StorageAway):
            await limiter.usage(1)
        await storage.aclose()
        for writer in writers:
            writer.close()


async def test_of_many_only_some_wait_for_a_redis_that_hangs(tmp_path: Path) -> None:
    """Those that have its connections: who waits for one of these hears of it from them."""
    path = tmp_path / "socket"
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_unix_server(lambda reader, writer: writers.append(writer), path)
    asked = 0
    async with server:
        impatient = settings(f"unix://{path}").storage.model_copy(update={"timeout_seconds": 1.5})
        storage = SharedStorage(impatient)  # longer than it is left alone after a failure

        async def ping() -> None:
            nonlocal asked
            asked += 1
            await storage.redis.ping()

        calls = [storage.call(ping) for _ in range(320)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(answer) for answer in answers} == {StorageAway}
        assert asked <= 64
        await storage.aclose()
        for writer in writers:
            writer.close()


async def test_slots_of_a_killed_server_come_back(redis_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_quotas, "LEASE_SECONDS", 4)  # a busy machine renews late
    config = settings(redis_server)
    storage = SharedStorage(config.storage)
    killed, other, who = RateLimiter(config, storage), RateLimiter(config, storage), client(in_flight=1)
    lease = await killed.admit(who)
    with pytest.raises(RateLimited):
        await other.admit(who)
    await killed._quotas.renew(who, lease.slot, lease.day, {})

    async with asyncio.timeout(20):
        while True:
            try:
                taken = await other.admit(who)
                break
            except RateLimited:
                await asyncio.sleep(0.05)
    await taken.settle(None, None)
    await storage.aclose()


async def test_tokens_of_the_day_that_redis_gave_in_vain_come_back(
    redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_quotas, "LEASE_SECONDS", 4)  # a busy machine renews late
    config, who = settings(redis_server), client(tokens_per_day=1000)
    storage = SharedStorage(config.storage)
    limiter = RateLimiter(config, storage)
    reserve = limiter._quotas.reserve

    async def unheard(*args: Any) -> Any:
        await reserve(*args)
        raise StorageAway("its answer was lost")

    held = await limiter.admit(who)
    await held.reserve(100)
    monkeypatch.setattr(limiter._quotas, "reserve", unheard)
    lost = await limiter.admit(who)
    await lost.reserve(600)  # passes: Redis is away
    await lost.settle(None, None)
    monkeypatch.setattr(limiter._quotas, "reserve", reserve)
    after = await limiter.admit(who)
    with pytest.raises(RateLimited, match="per day"):
        await after.reserve(500)
    async with asyncio.timeout(20):
        while True:
            await limiter._renew()
            try:
                await after.reserve(900)
                break
            except RateLimited:
                await asyncio.sleep(0.05)
    with pytest.raises(RateLimited, match="per day"):
        await after.reserve(1)  # what is in use is still held
    await held.settle(40, 10)
    await after.settle(900, 0)
    last = await limiter.admit(who)
    await last.reserve(50)
    await last.settle(None, None)
    await storage.aclose()


@pytest.mark.slow
async def test_two_servers_share_a_limit_to_within_two_percent(redis_server: str) -> None:
    limit, requests = 1020, 2000
    environ = {
        "GEMMA_SECURITY_RATE_LIMIT_PER_MINUTE": "17",
        "GEMMA_SECURITY_RATE_LIMIT_WINDOW_SECONDS": "3600",  # so that no new one begins meanwhile
        "GEMMA_STORAGE_URL": redis_server,
        "GEMMA_STORAGE_PREFIX": f"test-{uuid.uuid4().hex[:8]}",
        "GEMMA_STORAGE_TIMEOUT_SECONDS": "10",
    }
    servers = [start_fake(environ) for _ in range(2)]
    try:
        statuses: list[int] = []
        slots = asyncio.Semaphore(32)

        async def ask(http: httpx.AsyncClient, url: str) -> None:
            async with slots:
                statuses.append((await http.post(f"{url}/v1/chat/completions", json=CHAT)).status_code)

        started = time.monotonic()
        async with httpx.AsyncClient(timeout=60) as http:
            await asyncio.gather(*(ask(http, servers[number % 2].url) for number in range(requests)))
        seconds = time.monotonic() - started
    finally:
        for server in servers:
            server.end()
    print(f"{statuses.count(200)} of {requests} let through, limit {limit}, in {seconds:.1f} s")
    assert set(statuses) == {200, 429}
    assert abs(statuses.count(200) - limit) <= 0.02 * limit


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.12, "120ms"), (1, "1s"), (1.5, "1.5s"), (360, "6m0s"), (61, "1m1s")]
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text

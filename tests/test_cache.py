"""The response cache: who asks again gets the same, nobody gets another's, equal questions run once."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gemma_serve.api_keys import digest_of
from gemma_serve.app import create_app
from gemma_serve.cache import Answer, Origin, Repeat, ResponseCache, Run
from gemma_serve.cache.key import is_deterministic, key_of, tenant_of
from gemma_serve.cache.repeats import Repeats
from gemma_serve.clients import Client
from gemma_serve.engine.base import Delta, EngineState, GenerationRequest, LoadedModel, Usage
from gemma_serve.key_file import KeyEntry, KeyLimits, write_keys
from gemma_serve.settings import Settings

from .conftest import serving, until
from .fake_engine import FakeEngine
from .test_api_keys import bearer
from .test_rate_limit import settings as base_settings

ALICE, BOB, ADMIN = "sk-cache-alice-0123456789", "sk-cache-bob-0123456789ab", "sk-cache-admin-0123456789"
CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(params=["memory", "redis"])
def storage(request: pytest.FixtureRequest) -> str | None:
    if request.param == "memory":
        return None
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is missing: apt-get install redis-server")
    return str(request.getfixturevalue("redis_server"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    limits = KeyLimits(tokens_per_minute=1000)
    entries = [
        KeyEntry(name="alice", sha256=digest_of(ALICE).hex(), limits=limits),
        KeyEntry(name="bob", sha256=digest_of(BOB).hex()),
        KeyEntry(name="ops", sha256=digest_of(ADMIN).hex(), scopes=("admin",)),
    ]
    write_keys(path, entries)
    return path


def settings(storage: str | None = None, file: Path | None = None, **cache: Any) -> Settings:
    security = {} if file is None else {"api_keys_file": file}
    given = base_settings(storage, **security)
    return given.model_copy(update={"cache": given.cache.model_validate({"enabled": True} | cache)})


@asynccontextmanager
async def asking(
    engine: FakeEngine, storage: str | None = None, file: Path | None = None, **cache: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, ResponseCache]]:
    app = create_app(settings(storage, file, **cache), engine)
    limits = httpx.Limits(max_connections=300)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as http:
        yield http, app.state.cache


def anonymous(text: str) -> str:
    """An answer without what is each answer's own."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    objects = [json.loads(line) for line in lines if line != "[DONE]"]
    bare = [item | {"id": None, "created": None} for item in objects]
    for item in bare:  # vLLM tells of no cached tokens by 0 or not at all, by the answer's form
        if (usage := item.get("usage")) and usage.get("prompt_tokens_details") == {"cached_tokens": 0}:
            del usage["prompt_tokens_details"]
    return json.dumps(bare, sort_keys=True) + str("[DONE]" in lines)


async def test_what_either_form_left_serves_both(storage: str | None) -> None:
    forms: list[dict[str, Any]] = [{}, {"stream": True}, USAGE]
    for kind, ask in ((CHAT, ASK), ("/v1/completions", {"prompt": "Hi", "temperature": 0})):
        live = FakeEngine(("One piece",))
        async with (
            serving(create_app(base_settings(), live)) as url,
            httpx.AsyncClient(base_url=url, timeout=60) as http,
        ):
            expected = [anonymous((await http.post(kind, json=ask | form)).text) for form in forms]
        for first in forms:
            engine = FakeEngine(("One piece",))
            async with asking(engine, storage) as (http, cache):
                filled = await http.post(kind, json=ask | first)
                assert filled.headers["x-cache"] == "miss" and "age" not in filled.headers
                await until(lambda cache=cache: not cache.flights)  # type: ignore[misc]
                for form, text in zip(forms, expected, strict=True):
                    answer = await http.post(kind, json=ask | form)
                    assert answer.headers["x-cache"] == "hit" and 0 <= int(answer.headers["age"]) < 60
                    assert anonymous(answer.text) == text
                    assert answer.headers["x-request-id"] in answer.text
                assert len(engine.requests) == 1
                assert cache.outcomes == {"hit": 3, "miss": 1, "coalesced": 0, "bypass": 0}


# Whose answer it is.

CLIENTS = st.builds(lambda name: Client(f"key:{name}", name), st.text("ab:.", min_size=1, max_size=3)) | (
    st.builds(lambda name: Client(f"ip:{name}"), st.text("ab:.", min_size=1, max_size=3))
)
VALUES = st.none() | st.booleans() | st.integers(-2, 2) | st.floats(-2, 2) | st.text("ab", max_size=2)
BODIES = st.dictionaries(st.text("abmn", max_size=2), VALUES | st.lists(VALUES, max_size=2), max_size=3)
MODELS = st.builds(LoadedModel, st.sampled_from(["", "a", "ab"]))


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CLIENTS, CLIENTS, BODIES, BODIES, MODELS, MODELS, st.sampled_from([(), ("a",), ("a", "b")]))
def test_equal_keys_mean_the_same_client_model_and_question(
    one: Client,
    other: Client,
    body: dict[str, Any],
    another: dict[str, Any],
    model: LoadedModel,
    other_model: LoadedModel,
    sharing: tuple[str, ...],
) -> None:
    def key(client: Client, body: dict[str, Any], model: LoadedModel) -> bytes:
        return key_of(
            GenerationRequest("chat", body, "id", "gemma"), tenant_of(client, sharing), model
        ).digest

    together = one.id == other.id or {one.key, other.key} <= set(sharing)
    assert (key(one, body, model) == key(other, body, model)) == together
    if key(one, body, model) == key(other, another, other_model):
        assert together and model.identity == other_model.identity
        assert body == another
    assert key(one, body, model) == key(one, dict(reversed(body.items())), model)


async def test_nobody_gets_anothers_answer_unless_they_share(file: Path, storage: str | None) -> None:
    for sharing, kind in (((), "miss"), (("alice", "bob"), "hit"), (("*",), "hit")):
        engine = FakeEngine()
        async with asking(engine, storage, file, shared_by=sharing) as (http, _):
            for key, expected in ((ALICE, "miss"), (ALICE, "hit"), (BOB, kind)):
                answer = await http.post(CHAT, json=ASK, headers=bearer(key))
                assert answer.headers["x-cache"] == expected
            assert len(engine.requests) == (2 if kind == "miss" else 1)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"stream": False}, True),
        ({"temperature": 0.0}, True),
        ({"user": "somebody", "metadata": {"a": "b"}}, True),
        ({"model": "gemma-demo"}, True),
        ({"max_tokens": 5}, False),
        ({"some_field_of_tomorrow": 1}, False),
        ({"cache_salt": "a"}, False),
        ({"logprobs": True}, False),
        ({"messages": [{"role": "user", "content": "Ho"}]}, False),
        ({"request_id": "another"}, True),
        ({"user": None, "top_p": 1.0}, False),
    ],
)
async def test_what_makes_another_question(change: dict[str, Any], same: bool) -> None:
    async with asking(FakeEngine()) as (http, _):
        await http.post(CHAT, json=ASK)
        answer = await http.post(CHAT, json=ASK | change)
        assert answer.headers["x-cache"] == ("hit" if same else "miss")


def test_the_order_of_the_bodys_fields_says_nothing_but_that_within_them_may() -> None:
    def digest(body: dict[str, Any]) -> bytes:
        return key_of(GenerationRequest("chat", body, "id", "gemma"), "key:a", LoadedModel("")).digest

    schema: dict[str, Any] = {"properties": {"a": {}, "b": {}}}
    body = {"temperature": 0, "response_format": schema}
    assert digest(body) == digest(dict(reversed(body.items())))
    turned: dict[str, Any] = {"properties": {"b": {}, "a": {}}}  # the model is shown it; a grammar follows it
    assert digest(body) != digest(body | {"response_format": turned})


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/today.png"}}
INLINE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    ("body", "default", "expected"),
    [
        ({"temperature": 0}, 1.0, True),
        ({}, 0.0, True),
        ({}, 1.0, False),
        ({"temperature": 0.7}, 0.0, False),
        ({"temperature": 0.7, "seed": 7}, 1.0, True),
        ({"temperature": 0.7, "seed": -1}, 1.0, False),  # vLLM takes it for none
        ({"messages": [{"role": "user", "content": [INLINE]}]}, 0.0, True),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, 0.0, False),
    ],
)
def test_what_would_be_answered_the_same_again(body: dict[str, Any], default: float, expected: bool) -> None:
    assert is_deterministic(body, LoadedModel("", default)) is expected


async def test_sampled_answers_are_kept_only_on_request() -> None:
    sampled = ASK | {"temperature": 1}
    async with asking(FakeEngine()) as (http, cache):
        assert [(await http.post(CHAT, json=sampled)).headers["x-cache"] for _ in "ab"] == ["bypass"] * 2
        assert cache.outcomes["bypass"] == 2
    async with asking(FakeEngine(), mode="all") as (http, _):
        kinds = [(await http.post(CHAT, json=sampled)).headers["x-cache"] for _ in "ab"]
        assert kinds == ["miss", "hit"]


async def test_cache_control_of_the_request() -> None:
    engine = FakeEngine(("old",))
    async with asking(engine) as (http, cache):

        async def ask(control: str = "") -> tuple[str, str]:
            answer = await http.post(CHAT, json=ASK, headers={"Cache-Control": control})
            return answer.headers["x-cache"], answer.json()["choices"][0]["message"]["content"]

        assert await ask("no-store") == ("bypass", "old")
        assert cache.store.entries == 0
        assert await ask() == ("miss", "old")
        engine.words = ("new",)
        assert await ask() == ("hit", "old")
        assert await ask("No-Cache, max-age=0") == ("bypass", "new")
        assert await ask() == ("hit", "new")


async def test_without_a_cache_there_is_no_header() -> None:
    app = create_app(base_settings(), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        assert "x-cache" not in (await http.post(CHAT, json=ASK)).headers
        assert (await http.delete("/v1/cache")).json() == {"deleted": 0}


# The same bytes again, which nobody reads a second time.


async def test_the_same_bytes_are_the_same_question_only_to_who_sent_them(file: Path) -> None:
    engine = FakeEngine()
    async with asking(engine, None, file) as (http, cache):

        async def ask(key: str, **headers: str) -> httpx.Response:
            answer = await http.post(CHAT, json=ASK, headers=bearer(key) | headers)
            assert answer.status_code == 200
            return answer

        for key in (ALICE, BOB):
            answers = [await ask(key) for _ in range(4)]
            assert [answer.headers["x-cache"] for answer in answers] == ["miss", "hit", "hit", "hit"]
            assert len({answer.json()["id"] for answer in answers}) == 4
            assert all(answer.headers["x-request-id"] in answer.text for answer in answers)
        assert len(engine.requests) == 2
        assert (await ask(ALICE, **{"Cache-Control": "no-store"})).headers["x-cache"] == "bypass"
        for _ in range(3):
            answer = await ask(ALICE, Accept="text/plain")
            assert (answer.text, answer.headers["x-cache"]) == ("Hello world", "hit")
            assert "chat.completion.chunk" in (await ask(ALICE, Accept="application/x-ndjson")).text
            assert (await ask(ALICE)).json()["object"] == "chat.completion"
        other = await http.post("/v1/completions", json=ASK, headers=bearer(ALICE))
        assert (other.json()["object"], other.headers["x-cache"]) == ("text_completion", "miss")
        assert cache.outcomes["hit"] == 15


async def test_the_same_bytes_are_asked_anew_where_the_answer_has_gone(file: Path) -> None:
    engine = FakeEngine()
    async with asking(engine, None, file) as (http, _):

        async def ask() -> list[str]:
            answers = [await http.post(CHAT, json=ASK, headers=bearer(ALICE)) for _ in range(3)]
            return [answer.headers["x-cache"] for answer in answers]

        assert await ask() == ["miss", "hit", "hit"]
        await http.delete("/v1/cache", headers=bearer(ADMIN))
        assert await ask() == ["miss", "hit", "hit"]
        engine.model = LoadedModel("other weights")
        assert await ask() == ["miss", "hit", "hit"]
        engine.status.set(EngineState.LOADING)
        refused = await http.post(CHAT, json=ASK, headers=bearer(ALICE))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_loading")


async def test_the_same_bytes_need_their_clients_leave_for_the_model_each_time(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    entry = KeyEntry(name="alice", sha256=digest_of(ALICE).hex())
    write_keys(path, [entry])
    async with asking(FakeEngine(), None, path) as (http, _):

        async def ask() -> httpx.Response:
            return await http.post(CHAT, json=ASK, headers=bearer(ALICE))

        assert [(await ask()).headers["x-cache"] for _ in range(3)] == ["miss", "hit", "hit"]
        write_keys(path, [entry.model_copy(update={"models": ("another",)})])
        async with asyncio.timeout(20):
            while (answer := await ask()).status_code == 200:
                assert answer.headers["x-cache"] == "hit"
        assert answer.json()["error"]["code"] == "model_not_found"


def test_so_many_bodies_are_known_and_no_more() -> None:
    repeats, alice = Repeats(), Client("key:alice", "alice")
    key = key_of(GenerationRequest("chat", {}, "id", "gemma"), "key:alice", LoadedModel(""))
    repeat = Repeat(key, LoadedModel(""), None, None, None)
    for number in range(5000):
        repeats.keep(alice, Origin("chat", b"%d" % number), repeat)
    known = [n for n in range(5000) if repeats.find(alice, Origin("chat", b"%d" % n))]
    assert known == list(range(5000 - 4096, 5000))
    assert repeats.find(Client("key:bob", "bob"), Origin("chat", b"4999")) is None
    assert repeats.find(alice, Origin("completion", b"4999")) is None


# What is not kept.


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_and_aborted_answers_are_not_kept(stream: bool) -> None:
    engine = FakeEngine(fail_at=1)
    async with asking(engine) as (http, cache):
        assert "the fake engine failed" in (await http.post(CHAT, json=ASK | {"stream": stream})).text
        assert not cache.flights
        engine.fail_at, engine.finish_reason = None, "abort"
        assert (await http.post(CHAT, json=ASK | {"stream": stream})).headers["x-cache"] == "miss"
        engine.finish_reason = "length"
        assert (await http.post(CHAT, json=ASK | {"stream": stream})).headers["x-cache"] == "miss"
        assert (await http.post(CHAT, json=ASK | {"stream": stream})).headers["x-cache"] == "hit"


async def test_limits(storage: str | None) -> None:
    async with asking(FakeEngine(), storage, max_entries=2) as (http, cache):

        async def ask(number: int) -> str:
            answer = await http.post(CHAT, json=ASK | {"max_tokens": number})
            return str(answer.headers["x-cache"])

        assert [await ask(number) for number in (1, 2, 1, 3, 1, 2)] == [
            *("miss", "miss", "hit", "miss", "hit", "miss")
        ]
        await until(lambda: not cache.flights)
        assert (cache.store.entries, cache.store.evictions) == (2, 2)
        each = cache.store.size // 2
    async with asking(FakeEngine(("x" * 10_000,)), storage, max_bytes=25_000) as (http, cache):
        assert [await ask(number) for number in (1, 2, 3, 1)] == ["miss"] * 4
        await until(lambda: not cache.flights)
        assert cache.store.entries == 2 and 2 * each < cache.store.size <= 25_000
    async with asking(FakeEngine(("x" * 30_000,)), storage, max_bytes=25_000) as (http, cache):
        assert [await ask(1), await ask(1)] == ["miss", "miss"]
    async with asking(FakeEngine(), storage, ttl_seconds=0.05) as (http, cache):
        await ask(1)
        await asyncio.sleep(0.06)
        assert await ask(1) == "miss"


# Forgetting.


async def test_an_admin_empties_it(file: Path, storage: str | None) -> None:
    engine = FakeEngine()
    async with asking(engine, storage, file) as (http, cache):

        async def ask(key: str) -> str:
            kind = str((await http.post(CHAT, json=ASK, headers=bearer(key))).headers["x-cache"])
            await until(lambda: not cache.flights)
            return kind

        async def clear(**query: str) -> Any:
            return (await http.delete("/v1/cache", headers=bearer(ADMIN), params=query)).json()

        assert [await ask(ALICE), await ask(BOB)] == ["miss", "miss"]
        assert (await http.delete("/v1/cache", headers=bearer(ALICE))).status_code == 403
        assert (await http.delete("/v1/cache")).status_code == 401
        assert await clear(tenant="key:nobody") == {"deleted": 0}
        assert await clear(tenant="key:alice", model="gemma-demo") == {"deleted": 1}
        assert [await ask(ALICE), await ask(BOB)] == ["miss", "hit"]
        assert (await clear(model="gpt-x"))["error"]["code"] == "model_not_found"
        assert await clear() == {"deleted": 2}
        assert [await ask(ALICE), await ask(BOB)] == ["miss", "miss"]


async def test_what_is_under_way_when_it_is_emptied_is_not_kept() -> None:
    engine = FakeEngine(hang_at=0)
    async with asking(engine) as (http, _):
        asked = asyncio.create_task(http.post(CHAT, json=ASK))
        await until(lambda: engine.hanging == 1)
        await http.delete("/v1/cache")
        engine.go_on.set()
        assert (await asked).status_code == 200
        assert (await http.post(CHAT, json=ASK)).headers["x-cache"] == "miss"


async def test_another_load_of_the_model_empties_its_entries(storage: str | None) -> None:
    engine = FakeEngine()
    async with asking(engine, storage) as (http, cache):
        await http.post(CHAT, json=ASK)
        engine.model = LoadedModel("fake")
        assert (await http.post(CHAT, json=ASK)).headers["x-cache"] == "miss"
        await until(lambda: not cache.flights)
        engine.model = LoadedModel("other weights")
        assert (await http.post(CHAT, json=ASK)).headers["x-cache"] == "miss"


# What there is to keep, and to watch.


@pytest.mark.parametrize("form", ["whole", "stream"])
def test_an_answer_survives_its_encoding(form: str) -> None:
    usage = Usage(3, 2, {"prompt_tokens_details": {"cached_tokens": 1}})
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
    body = {"id": "x", "created": 7, "model": "gemma", "choices": [choice], "usage": usage.body()}
    stream = SimpleNamespace(created=7, model="gemma", fingerprint=None, usage=usage)
    deltas = [Delta(0, "H"), Delta(0, "i", "stop", None, {"stop_reason": 1})]
    answer = Answer.of_body("chat", body) if form == "whole" else Answer.of_stream("chat", stream, deltas)
    again = Answer.decode(answer.encode())
    assert again.body("y") == answer.body("y") and again.pieces() == answer.pieces()
    assert again.usage == usage and abs(again.stored - answer.stored) < 0.01
    for broken in (b"{}", b"[1, 2]", b"", answer.encode()[:-1], b"\xff\n"):
        with pytest.raises(ValueError):
            Answer.decode(broken)


def test_texts_are_kept_alike_however_they_came() -> None:
    stream = SimpleNamespace(created=7, model="gemma", fingerprint=None, usage=Usage(3, 5))
    end = Delta(0, "", "stop")
    one_by_one = [Delta(0, text) for text in "abcd"]
    together = [Run(0, ["a", "b"]), Delta(0, "c"), Run(0, ["d"])]
    kept = [Answer.of_stream("chat", stream, [*pieces, end]) for pieces in (one_by_one, together)]
    assert kept[0].rows == kept[1].rows
    assert kept[1].pieces() == [Run(0, list("abcd")), end] and together[0] == Run(0, ["a", "b"])


async def test_it_is_counted() -> None:
    async with asking(FakeEngine()) as (http, _):
        assert (await http.get("/health/metrics")).json()["cache_hit_rate"] is None
        for body in (ASK, ASK, ASK, ASK | {"max_tokens": 5}, ASK | {"temperature": 1}):
            await http.post(CHAT, json=body)
        assert (await http.get("/health/metrics")).json()["cache_hit_rate"] == 0.5
        text = (await http.get("/metrics")).text
        for result, count in (("hit", 2), ("miss", 2), ("coalesced", 0), ("bypass", 1)):
            assert f'gemma_cache_requests_total{{result="{result}"}} {count}.0' in text
        assert "gemma_cache_entries 2.0" in text and "gemma_cache_evictions_total 0.0" in text
        assert 'model_inference_total{model="gemma-demo",outcome="ok"} 3.0' in text

"""Blocks: who tries keys, or runs into limits again and again, is refused for a growing time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest
import websockets

from gemma_serve.api_keys import digest_of
from gemma_serve.app import create_app
from gemma_serve.blocks import Blocked, Blocks
from gemma_serve.key_file import KeyEntry, write_keys
from gemma_serve.storage import SharedStorage

from .conftest import running_redis, serving, until
from .fake_engine import FakeEngine
from .test_api_keys import bearer
from .test_rate_limit import settings

KEY, ADMIN = "sk-blocks-0123456789abc", "sk-blocks-admin-0123456789"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    entries = [
        KeyEntry(name="alice", sha256=digest_of(KEY).hex()),
        KeyEntry(name="ops", sha256=digest_of(ADMIN).hex(), scopes=("admin",)),
    ]
    write_keys(path, entries)
    return path


def from_(address: str, key: str = KEY) -> dict[str, str]:
    return bearer(key) | {"X-Forwarded-For": address}


@pytest.fixture(params=["memory", "redis"])
def storage(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "memory" else str(request.getfixturevalue("redis_server"))


async def test_wrong_keys_block_their_address_until_it_is_lifted(
    file: Path, storage: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(
        storage, api_keys_file=file, trusted_proxies=["127.0.0.1"], block_after_failures=5, block_seconds=30
    )
    async with (
        serving(create_app(config, FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        for _ in range(5):
            answer = await http.get("/v1/models", headers=from_("203.0.113.9", "sk-guess"))
            assert answer.status_code == 401
        for key in ("sk-guess", KEY):  # or guessing could go on behind the block
            answer = await http.get("/v1/models", headers=from_("203.0.113.9", key))
            assert answer.status_code == 429
            assert answer.json()["error"]["code"] == "client_blocked"
            assert 1 <= int(answer.headers["retry-after"]) <= 30
        with pytest.raises(websockets.InvalidStatus) as refused:
            ws = url.replace("http", "ws") + "/ws"
            await websockets.connect(ws, additional_headers=from_("203.0.113.9"))
        assert refused.value.response.status_code == 429
        assert (await http.get("/health/ready", headers=from_("203.0.113.9"))).status_code == 200
        assert (await http.get("/v1/models", headers=from_("203.0.113.10"))).status_code == 200
        assert "Blocked ip:203.0.113.9 for 30 s (authentication, offence 1)" in caplog.text
        admin = from_("203.0.113.11", ADMIN)
        (block,) = (await http.get("/admin/blocks", headers=admin)).json()["data"]
        assert (block["client"], block["reason"], block["offence"]) == ("ip:203.0.113.9", "authentication", 1)
        assert (
            await http.delete("/admin/blocks/ip:203.0.113.9", headers=from_("1.1.1.1"))
        ).status_code == 403
        assert (await http.delete("/admin/blocks/ip:203.0.113.9", headers=admin)).status_code == 204
        assert (await http.delete("/admin/blocks/ip:203.0.113.9", headers=admin)).status_code == 404
        assert (await http.get("/v1/models", headers=from_("203.0.113.9"))).status_code == 200


@pytest.mark.parametrize("path", ["/health/status", "/health/metrics", "/metrics"])
async def test_guessing_does_not_go_on_where_limits_do_not_reach(file: Path, path: str) -> None:
    config = settings(api_keys_file=file, block_after_failures=3, trusted_proxies=["127.0.0.1"])
    async with (
        serving(create_app(config, FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        for _ in range(3):
            answer = await http.get(path, headers=from_("203.0.113.9", "sk-guess"))
            assert answer.status_code == 401
        for key in ("sk-guess", KEY, ADMIN):
            for asked in (path, "/v1/models"):
                answer = await http.get(asked, headers=from_("203.0.113.9", key))
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "client_blocked")
        for probe in ("/health", "/health/live", "/health/ready"):
            assert (await http.get(probe, headers=from_("203.0.113.9", "sk-guess"))).status_code == 200


async def test_who_is_blocked_for_going_over_limits_may_still_be_scraped(file: Path) -> None:
    config = settings(
        api_keys_file=file, api_key_required=False, rate_limit_per_minute=1, block_after_limit_hits=1
    )
    async with (
        serving(create_app(config, FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        answers = [await http.get("/v1/models") for _ in range(3)]
        codes = [answer.json().get("error", {}).get("code") for answer in answers]
        assert codes == [None, "rate_limit_exceeded", "client_blocked"]
        for headers in ({}, bearer("unused"), bearer(KEY)):
            assert (await http.get("/health/status", headers=headers)).status_code == 200
        assert (await http.get("/metrics", headers=bearer(ADMIN))).status_code == 403


async def test_no_key_at_all_is_not_held_against_anyone(file: Path) -> None:
    config = settings(api_keys_file=file, block_after_failures=3)
    async with (
        serving(create_app(config, FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        for _ in range(10):
            assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/v1/models", headers=bearer(KEY))).status_code == 200


async def test_running_into_limits_blocks_the_key_not_the_address(file: Path) -> None:
    config = settings(api_keys_file=file, rate_limit_per_minute=1, block_after_limit_hits=3)
    async with (
        serving(create_app(config, FakeEngine())) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        codes = []
        for _ in range(6):
            answer = await http.get("/v1/models", headers=bearer(KEY))
            codes.append(answer.json().get("error", {}).get("code"))
        assert codes == [None, *["rate_limit_exceeded"] * 3, *["client_blocked"] * 2]
        rows = (await http.get("/admin/blocks", headers=bearer(ADMIN))).json()["data"]
        assert [row["client"] for row in rows] == ["key:alice"]


async def test_each_block_is_twice_as_long_up_to_the_longest(
    storage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(storage, block_after_failures=1, block_seconds=10, block_max_seconds=35)
    shared = SharedStorage(config.storage) if storage else None
    blocks = Blocks(config.security, shared)
    lengths, now = [], time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    for _ in range(4):
        await blocks.strike("ip:a", "authentication")
        with pytest.raises(Blocked):
            blocks.check("ip:a")
        (block,) = await blocks.list()
        lengths.append(round(block.until - now))
    assert lengths == [10, 20, 35, 35]
    now += 36
    blocks.check("ip:a")
    assert await blocks.list() == []
    if shared is not None:
        await shared.aclose()


async def test_another_server_knows_within_seconds(redis_server: str) -> None:
    config = settings(redis_server, block_after_failures=1)
    storages = [SharedStorage(config.storage) for _ in range(2)]
    here, there = (Blocks(config.security, storage) for storage in storages)

    async with there.shared():
        await here.strike("ip:a", "authentication")
        await until(lambda: is_blocked(there, "ip:a"))
        assert await here.lift("ip:a")
        await until(lambda: not is_blocked(there, "ip:a"))
    await asyncio.gather(*(storage.aclose() for storage in storages))


async def test_many_addresses_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks(settings(block_after_failures=2, block_window_seconds=1).security)
    now = time.time()
    for number in range(20_000):
        monkeypatch.setattr(time, "time", lambda at=now + number / 1000: at)
        await blocks.strike(f"ip:{number}", "authentication")
    assert len(blocks._counts) < 5_000


def is_blocked(blocks: Blocks, client: str) -> bool:
    try:
        blocks.check(client)
    except Blocked:
        return True
    return False


async def test_while_redis_is_away_each_server_blocks_and_tells_the_others_later(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    config = settings(f"unix://{path}", block_after_failures=2)
    storages = [SharedStorage(config.storage) for _ in range(2)]
    here, there = (Blocks(config.security, storage) for storage in storages)
    await here.strike("ip:a", "authentication")
    assert not is_blocked(here, "ip:a")
    await here.strike("ip:a", "authentication")
    assert is_blocked(here, "ip:a")
    async with here.shared(), there.shared():
        with running_redis(path):
            await until(lambda: is_blocked(there, "ip:a"))
            assert is_blocked(here, "ip:a")
            assert await there.lift("ip:a")
            await until(lambda: not is_blocked(here, "ip:a"))
            assert not is_blocked(there, "ip:a")
    await asyncio.gather(*(storage.aclose() for storage in storages))

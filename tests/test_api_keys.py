"""API keys: who gets in, and what of a key is seen."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import websockets
from fastapi import FastAPI, WebSocket

from gemma_serve import cli_keys
from gemma_serve.api_keys import ApiKeys, digest_of
from gemma_serve.app import create_app
from gemma_serve.clients import current_client
from gemma_serve.errors import StartupError, Unauthenticated
from gemma_serve.key_file import KeyEntry, KeyFileError, edited, read_keys, write_keys
from gemma_serve.logs import JsonFormatter
from gemma_serve.settings import Settings, SettingsError, masked

from .conftest import serving, until
from .fake_engine import FakeEngine
from .test_app import CHAT, settings
from .test_cli import run

KEY = "sk-test-0123456789abcdef"
ADMIN = "sk-test-admin-0123456789"


def entry(name: str, key: str, **fields: Any) -> KeyEntry:
    return KeyEntry(name=name, sha256=digest_of(key).hex(), **fields)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    write_keys(
        path,
        [
            entry("alice", KEY),
            entry("ops", ADMIN, scopes=("admin", "metrics")),
            entry("elsewhere", "sk-elsewhere-0123456789", models=("gemma-3-27b",)),
            entry("here", "sk-here-0123456789abcdef", models=("gemma-demo",)),
            entry("old", "sk-old-0123456789abcdef", expires="2020-01-01"),
            entry("gone", "sk-gone-0123456789abcdef", disabled=True),
        ],
    )
    return path


def with_echo(app: FastAPI) -> FastAPI:
    """And a WebSocket, which tells who it thinks the client is."""

    @app.websocket("/echo")
    async def echo(socket: WebSocket) -> None:
        offered = socket.scope["subprotocols"]
        await socket.accept(offered[0] if offered else None)
        client = current_client.get()
        await socket.send_json([client and client.key, offered])
        await socket.close()

    return app


def protected(file: Path, **security: Any) -> FastAPI:
    return with_echo(create_app(settings(security={"api_keys_file": file} | security), FakeEngine()))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_without_a_key_only_the_public_paths(file: Path) -> None:
    async with serving(protected(file)) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for path in (
            "/health/live",
            "/health/ready",
            "/docs",
            "/openapi.json",
            "/docs/assets/swagger-ui.css",
        ):
            assert (await client.get(path)).status_code == 200, path
        for path in (
            "/v1/models",
            "/health/status",
            "/health/metrics",
            "/nowhere",
            "/metrics",
            "/admin/blocks",
        ):
            answer = await client.get(path)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert answer.headers["x-request-id"]
        assert (await client.post("/health/live")).status_code == 401


async def test_a_key_gets_in_by_either_header(file: Path) -> None:
    async with serving(protected(file)) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for headers in (bearer(KEY), {"Authorization": f"bearer  {KEY}"}, {"X-API-Key": KEY}):
            answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "headers",
    [
        bearer("sk-test-0123456789abcdeg"),
        bearer(KEY + "x"),
        bearer(KEY[:-1]),
        bearer(KEY.upper()),
        bearer(digest_of(KEY).hex()),
        {"Authorization": "Bearer"},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"X-API-Key": ""},
        {"Cookie": f"api_key={KEY}"},
        bearer("sk-old-0123456789abcdef"),
        bearer("sk-gone-0123456789abcdef"),
    ],
)
async def test_a_wrong_key_does_not(file: Path, headers: dict[str, str]) -> None:
    async with serving(protected(file)) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for query in ("", f"?api_key={KEY}"):
            answer = await client.post(f"/v1/chat/completions{query}", json=CHAT, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert KEY not in answer.text


async def test_openai_client_raises_its_own_errors(file: Path) -> None:
    async with serving(protected(file)) as url:
        for key, error in ((KEY + "x", openai.AuthenticationError), (ADMIN, openai.PermissionDeniedError)):
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                with pytest.raises(error):
                    await client.models.list()
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == ["gemma-demo"]


async def test_anthropics_route_has_anthropics_errors(file: Path) -> None:
    async with serving(protected(file)) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        answer = await client.post("/v1/messages", json={}, headers={"X-API-Key": "wrong"})
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "authentication_error"


async def test_models_of_a_key(file: Path) -> None:
    async with serving(protected(file)) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        elsewhere, here = bearer("sk-elsewhere-0123456789"), bearer("sk-here-0123456789abcdef")
        assert (await client.get("/v1/models", headers=elsewhere)).json()["data"] == []
        answer = await client.post("/v1/chat/completions", json=CHAT, headers=elsewhere)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_not_found")
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=here)).status_code == 200
        assert len((await client.get("/v1/models", headers=here)).json()["data"]) == 1


async def test_websockets_are_refused_before_they_are_accepted(file: Path) -> None:
    async with serving(protected(file)) as url:
        ws = url.replace("http", "ws") + "/ws"
        for headers in ({}, bearer("wrong-wrong-wrong-1")):
            with pytest.raises(websockets.InvalidStatus) as refused:
                await websockets.connect(ws, additional_headers=headers)
            assert refused.value.response.status_code == 401
            assert b'"error"' in refused.value.response.body
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(ws, additional_headers=bearer(ADMIN))
        assert refused.value.response.status_code == 403


async def test_websockets_take_a_header_or_a_subprotocol_which_is_not_repeated(file: Path) -> None:
    async with serving(protected(file)) as url:
        ws = url.replace("http", "ws") + "/echo"
        async with websockets.connect(ws, additional_headers=bearer(KEY)) as socket:
            assert await socket.recv() == '["alice",[]]'
        offered: Any = ["chat", f"openai-insecure-api-key.{KEY}"]
        async with websockets.connect(ws, subprotocols=offered) as socket:
            assert socket.subprotocol == "chat"
            assert await socket.recv() == '["alice",["chat"]]'


async def test_admin_and_metrics_need_their_scope(file: Path) -> None:
    async with serving(protected(file)) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for path, status in (("/admin/nothing", 404), ("/metrics", 200)):
            assert (await client.get(path, headers=bearer(KEY))).status_code == 403
            assert (await client.get(path, headers=bearer(ADMIN))).status_code == status
        assert (await client.get("/v1/models", headers=bearer(ADMIN))).status_code == 403


async def test_admin_without_keys_is_for_programs_of_this_machine_only() -> None:
    app = create_app(settings(security={"trusted_proxies": ["127.0.0.1"]}), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        assert (await client.get("/admin/nothing")).status_code == 404
        for headers in (
            {"X-Forwarded-For": "203.0.113.5"},
            {"X-Forwarded-For": "127.0.0.1"},
            {"Forwarded": "for=127.0.0.1"},
            {"Origin": "https://evil.example"},
            {"Host": "evil.example"},
            {"Host": "localhost.evil.example:80"},
        ):
            answer = await client.get("/admin/nothing", headers=headers)
            assert answer.status_code == 403, headers


async def test_admin_is_closed_even_where_keys_are_not_required(file: Path) -> None:
    app = protected(file, api_key_required=False)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        assert (await client.get("/v1/models", headers=bearer("unused"))).status_code == 200
        assert (await client.get("/admin/nothing")).status_code == 401
        assert (await client.get("/admin/nothing", headers=bearer(KEY))).status_code == 403
        assert (await client.get("/admin/nothing", headers=bearer(ADMIN))).status_code == 404


async def test_logs_have_the_name_and_never_the_key(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(protected(file)) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        await client.get("/v1/models", headers=bearer(KEY))
        await client.get("/v1/models", headers=bearer(KEY + "x"))
    text = "\n".join(JsonFormatter().format(record) for record in caplog.records if record.name != "httpx")
    assert '"key":"alice"' in text
    assert KEY not in text


def good(keys: ApiKeys, key: str) -> bool:
    try:
        keys.authenticate(key)
    except Unauthenticated:
        return False
    return True


async def test_an_edit_takes_effect_and_a_broken_one_does_not(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys(settings(security={"api_keys_file": file}).security)
    new = "sk-new-0123456789abcdef"
    async with keys.watched():
        assert good(keys, KEY) and not good(keys, new)
        write_keys(file, [entry("new", new)])
        await until(lambda: good(keys, new) and not good(keys, KEY))
        no_day = f"keys: [{{name: a, sha256: '{'0' * 64}', expires: 2127-02-30}}]"
        for broken in ("keys: [{name: a}]", "keys: {", "\xff", "keys: 5", "other: []", "", no_day):
            caplog.clear()
            file.write_text(broken)  # noqa: ASYNC240
            await until(lambda: any("stay in use" in record.message for record in caplog.records))
            assert good(keys, new)
        os.remove(file)
        await asyncio.sleep(0)
        assert good(keys, new)
        write_keys(file, [entry("alice", KEY)])
        await until(lambda: good(keys, KEY) and not good(keys, new))


async def test_an_edit_that_keeps_size_and_time_takes_effect(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    write_keys(path, [entry("alice", KEY)])
    keys = ApiKeys(settings(security={"api_keys_file": path}).security)
    before = path.stat()
    async with keys.watched():
        await asyncio.sleep(0.05)  # older kernels note changes in steps of a timer
        path.write_text(path.read_text().replace(digest_of(KEY).hex(), digest_of(ADMIN).hex()))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        await until(lambda: good(keys, ADMIN))
        assert not good(keys, KEY)


def test_keys_of_the_list_are_named_by_their_digest(caplog: pytest.LogCaptureFixture) -> None:
    keys = ApiKeys(
        Settings.load(environ={"GEMMA_SECURITY_API_KEYS": f"{KEY}, short"}, env_file=None).security
    )
    assert keys.authenticate(KEY).key == f"key-{digest_of(KEY).hex()[:8]}"
    assert keys.authenticate(KEY).scopes == {"inference"}
    assert "only 5 characters" in caplog.text


def refused(lines: Iterable[str], path: Path) -> str:
    path.write_text("\n".join(lines))
    with pytest.raises(StartupError) as caught:
        ApiKeys(settings(security={"api_keys_file": path}).security)
    assert "SECRET" not in str(caught.value)
    return str(caught.value)


def test_a_wrong_file_is_explained_without_its_values(tmp_path: Path) -> None:
    path, digest = tmp_path / "keys.yaml", "0" * 64
    with pytest.raises(StartupError, match="keys create"):
        ApiKeys(settings(security={"api_keys_file": path}).security)
    assert "keys[0].sha256" in refused(["keys:", "- {name: a, sha256: SECRET}"], path)
    assert "keys[0].scopes" in refused(["keys:", f"- {{name: a, sha256: '{digest}', scopes: [root]}}"], path)
    twice = [f"- {{name: a, sha256: '{digest}'}}", f"- {{name: a, sha256: '{'1' * 64}'}}"]
    assert "2 keys have the name 'a'" in refused(["keys:", *twice], path)
    assert "keys[0].limit" in refused(["keys:", f"- {{name: a, sha256: '{digest}', limit: {{}}}}"], path)


@pytest.mark.parametrize(
    ("written", "end"),
    [
        ("2127-01-31", "2127-02-01 00:00 UTC"),
        ("'2127-01-31'", "2127-02-01 00:00 UTC"),
        ("9999-12-31", "9999-12-31 23:59 UTC"),
        ("2127-01-31 12:00", "2127-01-31 12:00 UTC"),
        ("'2127-01-31T12:00'", "2127-01-31 12:00 UTC"),
        ("2127-01-31T12:00:00+05:00", "2127-01-31 07:00 UTC"),
        ("9999-12-31T23:00:00-05:00", None),
        ("2127-02-30", None),
        ("'2127-02-30'", None),
        ("soon", None),
    ],
)
def test_when_a_key_ends(tmp_path: Path, written: str, end: str | None) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys: [{{name: a, sha256: '{digest_of(KEY).hex()}', expires: {written}}}]")
    if end is None:
        with pytest.raises(KeyFileError, match=str(path)):
            read_keys(path)
        return
    (read,) = read_keys(path)
    row = cli_keys._row(read)
    assert (row["EXPIRES"], row["STATE"]) == (end, "active")
    assert good(ApiKeys(settings(security={"api_keys_file": path}).security), KEY)
    write_keys(path, [read])
    assert read_keys(path) == [read]


def test_keys_that_are_required_must_exist() -> None:
    with pytest.raises(SettingsError, match="nobody could get in"):
        Settings.load(environ={"GEMMA_SECURITY_API_KEY_REQUIRED": "true"}, env_file=None)
    for environ in ({"GEMMA_SECURITY_PUBLIC_PATHS": "/*"}, {"GEMMA_SECURITY_PUBLIC_PATHS": "/admin/blocks"}):
        with pytest.raises(SettingsError, match="must not be public"):
            Settings.load(environ=environ, env_file=None)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([""], "key 1 of 1 is empty"),
        ([KEY, "  "], "key 2 of 2 is empty"),
        ([f" {KEY}"], "key 1 of 1 has blanks around it"),
        ([f"{KEY}\n"], "key 1 of 1 has blanks around it"),
    ],
)
def test_a_key_that_nobody_could_send_is_refused(tmp_path: Path, keys: list[str], words: str) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(json.dumps({"security": {"api_keys": keys}}))
    for given in ({"config": config}, {"environ": {"GEMMA_SECURITY_API_KEYS": json.dumps(keys)}}):
        with pytest.raises(SettingsError, match=words) as caught:
            Settings.load(**{"environ": {}, "env_file": None} | given)
        assert "security.api_keys" in str(caught.value) and KEY not in str(caught.value)


async def test_an_empty_subprotocol_is_no_key(file: Path) -> None:
    async with serving(protected(file, block_after_failures=1)) as url:
        offered: Any = ["openai-insecure-api-key."]
        for _ in range(2):  # nor a wrong one, which would block
            with pytest.raises(websockets.InvalidStatus) as refused:
                await websockets.connect(url.replace("http", "ws") + "/ws", subprotocols=offered)
            assert refused.value.response.status_code == 401
            assert b"didn't provide" in refused.value.response.body
        offered.append(f"openai-insecure-api-key.{KEY}")
        async with websockets.connect(url.replace("http", "ws") + "/echo", subprotocols=offered) as socket:
            assert await socket.recv() == '["alice",[]]'


def test_the_command_makes_lists_revokes_and_verifies(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    option = ("--file", str(file))
    made = run("keys", "create", "ci", *option, "--expires", "30d", "--requests-per-minute", "60")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert key.startswith("sk-gemma-") and len(key) > 50
    assert key not in file.read_text() + made.stderr
    assert file.stat().st_mode & 0o077 == 0
    (stored,) = read_keys(file)
    assert stored.sha256 == digest_of(key).hex()
    assert stored.limits.requests_per_minute == 60
    assert "used once" in run("keys", "create", "ci", *option).stderr
    made = run("keys", "create", "for-ever", *option, "--expires", "9999-12-31")
    assert made.returncode == 0, made.stderr
    shown = run("keys", "list", *option).stdout
    assert "ci" in shown and "9999-12-31" in shown
    assert run("keys", "verify", *option, stdin=key).returncode == 0
    assert run("keys", "verify", *option, stdin="sk-wrong").returncode == 1
    assert run("keys", "revoke", "ci", *option).returncode == 0
    assert run("keys", "verify", *option, stdin=key).returncode == 1
    assert "no key 'nobody'" in run("keys", "revoke", "nobody", *option).stderr
    for wrong in (
        ("create", "a b"),
        ("create", "x", "--expires", "soon"),
        ("create", "x", "--expires", "2127-02-30"),
        ("create", "x", "--in-flight=-1"),
    ):
        result = run("keys", *wrong, *option)
        assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root edits what is another's and leaves it theirs")
def test_an_edit_by_root_leaves_the_file_to_its_owner(file: Path) -> None:
    os.chown(file, 1234, 4321)
    file.chmod(0o640)
    with edited(file) as entries:
        entries.pop()
    found = file.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (1234, 4321, 0o640)


def test_check_masks_keys() -> None:
    environ = {"GEMMA_SECURITY_API_KEYS": KEY}
    result = run("check", environ=environ)
    assert result.returncode == 0, result.stderr
    assert KEY not in result.stdout
    broken = run("check", environ={"GEMMA_SECURITY_API_KEYS": f'["{KEY}", 5, {{}}]'})
    assert KEY not in broken.stderr + broken.stdout


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:6379/0", "redis://user:********@host:6379/0"),
        ("redis://:se/cr@et@host", "redis://:********@host"),
        ("redis://host/0?password=secret&x=1", "redis://host/0?password=********&x=1"),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
def test_passwords_of_urls_are_masked(url: str, shown: str) -> None:
    assert masked("url", url) == shown

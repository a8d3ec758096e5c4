"""Models change under vLLM: nothing is lost, nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
import torch
import yaml
from safetensors.torch import save_file

from .conftest import ServerProcess, start_server
from .processes import below
from .tiny_models import SIZE, make_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

TOKENS = 40
LOAD_SECONDS = 240
ADAPTERS = {"enable_lora": True, "max_lora_rank": 8}

Models = tuple[ServerProcess, httpx.AsyncClient]


@asynccontextmanager
async def two_models(
    folder: Path,
    engine: dict[str, Any] | None = None,
    *,
    drain_seconds: float = 60,
    max_length: int = 1024,
    listed: dict[str, dict[str, Any]] | None = None,
) -> AsyncIterator[Models]:
    """A server that runs a tiny Gemma 3 called `one` and may run a tiny Gemma 2 called `two`."""
    arguments = {"enforce_eager": True, "kv_cache_memory_bytes": 100_000_000} | (engine or {})
    one = await asyncio.to_thread(make_model, "gemma3_text", folder / "one")
    two = await asyncio.to_thread(make_model, "gemma2", folder / "2")
    config = folder / "models.yaml"
    settings = {
        "model": {"name": str(one), "max_length": max_length},
        "engine": arguments,
        "models": {"two": {"name": str(two), "max_length": max_length, "engine": arguments}} | (listed or {}),
        "loading": {"wait_seconds": LOAD_SECONDS, "drain_seconds": drain_seconds, "warm_up_requests": 2},
    }
    config.write_text(yaml.safe_dump(settings))
    offline = {"HF_HUB_OFFLINE": "1"}  # what is missing is not looked for
    server = await asyncio.to_thread(start_server, "--config", str(config), environ=offline)
    try:
        await asyncio.to_thread(server.wait_for, r"one: ready")
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=2 * LOAD_SECONDS, limits=limits) as client:
            yield server, client
    finally:
        assert await asyncio.to_thread(server.end) == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Models]:
    """One server for most tests here: a start takes longer than what they do with it."""
    folder = tmp_path_factory.mktemp("models")
    (empty := folder / "empty").mkdir()
    weightless = make_model("gemma2", folder / "weightless")
    (weightless / "model.safetensors").unlink()
    eager = {"enforce_eager": True}
    listed: dict[str, dict[str, Any]] = {
        "empty": {"name": str(empty)},
        "missing": {"name": "no-such-organisation/no-such-model"},
        "weightless": {"name": str(weightless), "max_length": 1024, "engine": eager},
        "huge": {"name": str(folder / "2"), "engine": eager | {"kv_cache_memory_bytes": 1 << 50}},
    }
    async with two_models(folder, ADAPTERS, listed=listed) as models:
        yield models


@pytest_asyncio.fixture(loop_scope="module")
async def models(shared: Models) -> Models:
    """It runs `one`, whatever another test has left."""
    answer = await change(shared[1], "one")
    assert answer.status_code == 200, answer.text
    return shared


async def change(client: httpx.AsyncClient, model: str, what: str = "load") -> httpx.Response:
    return await client.post(f"/v1/models/{model}/{what}", params={"wait": True})


async def ask(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": TOKENS, "ignore_eos": True}
    answer = await client.post("/v1/chat/completions", json=body | {"temperature": 0} | more)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


@dataclass
class Clients:
    """Ask without a pause, whichever model runs; every second one streams."""

    client: httpx.AsyncClient
    answered: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def at_work(self, count: int) -> AsyncIterator[None]:
        over = asyncio.Event()
        tasks = [asyncio.create_task(self._work(number, over)) for number in range(count)]
        try:
            yield
        finally:
            over.set()
            await asyncio.gather(*tasks)

    async def _work(self, number: int, over: asyncio.Event) -> None:
        while not over.is_set():
            try:
                model = await (self._stream() if number % 2 else self._whole())
                self.answered[model] = self.answered.get(model, 0) + 1
            except (AssertionError, httpx.HTTPError) as error:
                self.lost.append(repr(error))
                await asyncio.sleep(0.1)

    async def _whole(self) -> str:
        answer = await ask(self.client)
        assert answer["usage"]["completion_tokens"] == TOKENS
        return str(answer["model"])

    async def _stream(self) -> str:
        body = {"prompt": "Once", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
        assert response.status_code == 200 and lines[-1] == "data: [DONE]", lines[-3:]
        assert f'"completion_tokens":{TOKENS}' in lines[-2], lines[-2]
        return "two" if '"model":"two"' in lines[0] else "one"


def memory(server: ServerProcess) -> int:
    """Bytes, of the server and what runs below it."""
    processes = [psutil.Process(server.process.pid), *below(server.process.pid)]
    return sum(process.memory_full_info().pss for process in processes)


async def swap_under_load(models: Models, times: int, say: Callable[[str], None]) -> None:
    """`times` to the other model and back, with 16 clients that never pause."""
    server, client = models
    clients = Clients(client)
    wanted = text_of(await ask(client))
    async with clients.at_work(16):
        for number in range(2 * times):
            before = below(server.process.pid)
            assert before
            started = time.monotonic()
            model = ("two", "one")[number % 2]
            answer = await change(client, model)
            assert answer.status_code == 200, answer.text
            assert answer.json()["state"] == "ready"
            say(f"{model} after {time.monotonic() - started:.1f} s")
            assert not any(process.is_running() for process in before)
            assert len(below(server.process.pid)) == len(before)
            seen = clients.answered.get(model, 0)
            async with asyncio.timeout(60):
                while clients.answered.get(model, 0) < seen + 32:
                    await asyncio.sleep(0.05)
            if number == 1:
                first = memory(server)  # once both have been there
    last = memory(server)
    say(f"{clients.answered}; {first / 1e6:.0f} MB after the first round, {last / 1e6:.0f} MB now")
    assert not clients.lost, clients.lost[:3]
    assert clients.answered.keys() == {"one", "two"}
    assert last <= first * 1.05
    assert text_of(await ask(client)) == wanted


async def test_swaps_under_load_lose_nothing_and_leave_nothing(models: Models) -> None:
    await swap_under_load(models, 2, print)


async def test_what_cannot_be_loaded_leaves_the_old_model_at_work(models: Models) -> None:
    server, client = models
    wanted = text_of(await ask(client))
    engine = below(server.process.pid)
    for model, told in (("empty", "no config.json"), ("missing", "neither as a local folder nor")):
        answer = await change(client, model)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (500, "model_load_failed")
        assert told in error["message"] and "\n" not in error["message"]
        assert below(server.process.pid) == engine  # it has not even been interrupted
    for model, told in (("weightless", "model weights"), ("huge", "does not fit into")):
        answer = await change(client, model)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (500, "model_load_failed")
        assert told in error["message"], error
        assert told in (await client.get(f"/v1/models/{model}")).json()["error"]
        assert (await client.get("/health/ready")).status_code == 200
        assert text_of(await ask(client)) == wanted


async def test_a_new_engine_that_is_killed_while_it_loads_brings_the_old_one_back(models: Models) -> None:
    server, client = models
    wanted = text_of(await ask(client))
    before = below(server.process.pid)
    swap = asyncio.create_task(change(client, "two"))
    async with asyncio.timeout(120):
        while not (fresh := [one for one in below(server.process.pid) if one not in before]):
            await asyncio.sleep(0.05)
    for process in fresh:
        process.kill()
    answer = await swap
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_load_failed")
    assert text_of(await ask(client)) == wanted


async def test_unload_frees_everything_and_an_adapter_comes_back_with_its_model(
    models: Models, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    server, client = models
    plain = text_of(await ask(client))
    body = {"name": "changed", "path": str(adapter)}
    answer = await client.post("/v1/models/one/adapters", json=body)
    assert answer.status_code == 200, answer.text
    changed = await ask(client, model="changed")
    assert changed["model"] == "changed" and text_of(changed) != plain
    assert text_of(await ask(client, model="one")) == plain
    nothing = {"name": "nothing", "path": str(tmp_path)}
    assert (await client.post("/v1/models/one/adapters", json=nothing)).status_code == 400

    assert (await change(client, "one", "unload")).status_code == 200
    assert below(server.process.pid) == []
    assert (await client.get("/health/ready")).json()["status"] == "unloaded"
    assert (await client.get("/health/live")).status_code == 200
    assert (await change(client, "one")).status_code == 200

    assert text_of(await ask(client, model="changed")) == text_of(changed)
    assert (await client.delete("/v1/models/one/adapters/changed")).status_code == 204
    assert (await client.get("/v1/models/changed")).status_code == 404
    assert text_of(await ask(client)) == plain


async def test_sleep_needs_a_gpu(models: Models) -> None:
    _, client = models
    answer = await change(client, "one", "sleep")
    assert (answer.status_code, answer.json()["error"]["code"]) == (501, "not_implemented")
    assert (await ask(client))["model"] == "one"
    row = (await client.get("/v1/models/one")).json()
    assert (row["modalities"], row["max_model_len"]) == (["text"], 1024)


async def test_who_outlasts_the_drain_is_told_and_the_server_ends_in_the_midst_of_a_load(
    tmp_path: Path,
) -> None:
    async with two_models(tmp_path, drain_seconds=0.2, max_length=8192) as (server, client):
        long = {"max_tokens": 8000, "ignore_eos": True}

        async def stream() -> str:
            body = {"prompt": "Once", "stream": True} | long
            async with client.stream("POST", "/v1/completions", json=body) as response:
                return [line async for line in response.aiter_lines() if line][-1]

        chat = {"messages": [{"role": "user", "content": "Hi"}]} | long
        whole = asyncio.create_task(client.post("/v1/chat/completions", json=chat))
        streams = [asyncio.create_task(stream()) for _ in range(8)]
        async with asyncio.timeout(60):
            while (await client.get("/health/metrics")).json()["engine"]["running"] < 9:
                await asyncio.sleep(0.05)
        assert (await change(client, "one", "unload")).status_code == 200
        told = {"type": "service_unavailable", "code": "model_not_loaded"}
        for line in await asyncio.gather(*streams):
            assert json.loads(line.removeprefix("data: "))["error"].items() >= told.items(), line
        answer = await whole
        assert answer.status_code == 503 and answer.json()["error"].items() >= told.items(), answer.text
        assert below(server.process.pid) == []
        assert (await client.post("/v1/models/two/load")).status_code == 202
        async with asyncio.timeout(120):
            while not below(server.process.pid):
                await asyncio.sleep(0.05)


def make_adapter(folder: Path) -> Path:
    """For the tiny Gemma 3: large enough to change what it says."""
    rank, hidden, inner = 8, SIZE["hidden_size"], SIZE["intermediate_size"]
    torch.manual_seed(1)
    weights = {}
    for layer in range(SIZE["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, inner)
        weights[f"{name}.lora_B.weight"] = torch.randn(hidden, rank)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["down_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

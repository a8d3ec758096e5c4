"""Several configured models, of which one runs: the gate, the changes, what clients and operators are told.

The engine is not the subject here; `test_models_live.py` does the same with vLLM.
"""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gemma_serve.api_keys import digest_of
from gemma_serve.app import create_app
from gemma_serve.engine.base import EngineState, GenerationRequest, LoadedModel, RelayKind, Usage
from gemma_serve.errors import EngineDied, StartupError
from gemma_serve.key_file import KeyEntry, write_keys
from gemma_serve.settings import Settings, SettingsError

from .chat_client import chatting
from .conftest import serving, until
from .fake_engine import FakeEngine
from .test_api_keys import KEY, bearer, file  # noqa: F401  # a fixture

CHAT = "/v1/chat/completions"
LISTED = {
    "small": {"name": "org/small", "aliases": ["gpt-small"], "max_length": 512},
    "big": {"name": "org/big", "engine": {"max_num_seqs": 4}},
}


class Engine(FakeEngine):
    """Answers with the name of its model."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        super().__init__((f"I am {settings.model.id}",), **options)
        self.settings = settings
        self.broken: str | None = None
        self.faulty: str | None = None
        self.ran = False
        self.loads, self.checks = asyncio.Event(), asyncio.Event()
        self.loads.set()
        self.checks.set()

    async def check(self) -> None:
        await self.checks.wait()
        if self.faulty:
            raise StartupError(self.faulty)

    async def start(self) -> None:
        async def load() -> None:
            self.status.set(EngineState.LOADING, "reading weights")
            await self.loads.wait()
            if self.broken:
                self.status.set(EngineState.FAILED, error=self.broken)
            else:
                self.ran = True
                self.status.set(EngineState.READY)

        self._loading = asyncio.create_task(load())

    async def stop(self) -> None:
        self._loading.cancel()
        if self.status.error is None:
            await super().stop()
        self.stopped = True

    async def complete(self, request: GenerationRequest) -> tuple[dict[str, Any], Usage]:
        assert not self.stopped
        names = {self.settings.model.id, *self.adapters}
        assert request.model in names, f"{request.model} was asked of {names}"
        return await super().complete(request)


class Shelf:
    """Makes the engines, and has those made so far. `prepare` changes the next ones of a model."""

    def __init__(self) -> None:
        self.made: list[Engine] = []
        self._prepared: dict[str, Callable[[Engine], None]] = {}

    def prepare(self, model: str, change: Callable[[Engine], None]) -> None:
        self._prepared[model] = change

    def make(self, settings: Settings) -> Engine:
        engine = Engine(settings)
        if (change := self._prepared.get(settings.model.id)) is not None:
            change(engine)
        self.made.append(engine)
        return engine

    @property
    def running(self) -> Engine:
        (engine,) = [one for one in self.made if hasattr(one, "_loading") and not one.stopped]
        return engine


@asynccontextmanager
async def serving_models(**sections: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Shelf]]:
    settings = Settings(model={"name": "gemma-demo"}, models=LISTED, **sections)
    shelf = Shelf()
    app = create_app(settings, make_engine=shelf.make)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        await until(lambda: shelf.made[0].status.ready)
        yield client, shelf


async def state(client: httpx.AsyncClient, model: str, wanted: str) -> dict[str, Any]:
    """Wait for it."""
    async with asyncio.timeout(10):
        while True:
            row = (await client.get(f"/v1/models/{model}")).json()
            if row.get("state") == wanted:
                return dict(row)
            await asyncio.sleep(0.005)


async def ask(client: httpx.AsyncClient, model: str | None = None, **more: Any) -> httpx.Response:
    named = {} if model is None else {"model": model}
    body = {"messages": [{"role": "user", "content": "Who are you?"}]} | named | more
    return await client.post(CHAT, json=body)


def said(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def error_of(answer: httpx.Response) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


async def change(client: httpx.AsyncClient, model: str, what: str, **query: Any) -> httpx.Response:
    return await client.post(f"/v1/models/{model}/{what}", params={"wait": True} | query)


async def test_the_list_has_every_model() -> None:
    async with serving_models() as (client, _):
        rows = {row["id"]: row for row in (await client.get("/v1/models")).json()["data"]}
        assert list(rows) == ["gemma-demo", "small", "big"]
        assert [row["state"] for row in rows.values()] == ["ready", "unloaded", "unloaded"]
        assert rows["small"]["max_model_len"] == 512 and rows["small"]["aliases"] == ["gpt-small"]
        assert rows["gemma-demo"]["modalities"] == ["text"] and rows["small"]["modalities"] is None
        assert (await client.get("/v1/models/gpt-small")).json()["id"] == "small"
        assert (await client.get("/v1/models/none")).status_code == 404


async def test_a_swap_and_back() -> None:
    async with serving_models() as (client, shelf):
        assert said(await ask(client)) == "I am gemma-demo"
        first = shelf.running
        answer = await change(client, "gpt-small", "load")
        assert (answer.status_code, answer.json()["state"]) == (200, "ready")
        assert first.stopped
        assert shelf.running.settings.model.id == "small"
        assert shelf.running.settings.model.max_length == 512
        assert said(await ask(client, "gpt-small")) == "I am small"
        assert said(await ask(client)) == "I am small"  # who names none gets what runs
        ids = [row["id"] for row in (await client.get("/v1/models")).json()["data"]]
        assert ids == ["small", "gemma-demo", "big"]  # as does who takes the first
        assert (await client.get("/health/status")).json()["model"]["id"] == "small"
        assert (await change(client, "small", "load")).status_code == 200  # it runs: nothing is done
        answer = await client.post("/v1/models/big/load")
        assert (answer.status_code, answer.json()["state"]) == (202, "loading")
        await state(client, "big", "ready")
        assert shelf.running.settings.engine == {"max_num_seqs": 4}
        assert (await change(client, "gemma-demo", "load")).status_code == 200
        assert said(await ask(client, "gemma-demo")) == "I am gemma-demo"
        assert sum(not engine.stopped for engine in shelf.made if engine.requests) == 1


async def test_who_asks_for_another_model_is_told_what_to_do() -> None:
    async with serving_models() as (client, _):
        answer = await ask(client, "small")
        assert error_of(answer)[:2] == (503, "model_not_loaded")
        assert "POST /v1/models/small/load" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) > 0
        assert error_of(await ask(client, "none"))[:2] == (404, "model_not_found")
        for path, body in (
            ("/tokenize", {"model": "small", "prompt": "a"}),
            ("/v1/responses", {"model": "small", "input": "a"}),
            ("/v1/messages", {"model": "small", "max_tokens": 1, "messages": []}),
        ):
            assert (await client.post(path, json=body)).status_code == 503, path
        answer = await ask(client, "small", stream=True)
        assert error_of(answer)[:2] == (503, "model_not_loaded")


async def test_requests_finish_before_their_model_ends() -> None:
    async with serving_models() as (client, shelf):
        first = shelf.running
        first.hang_at = 0
        running = [asyncio.create_task(ask(client)) for _ in range(3)]
        await until(lambda: first.hanging == 3)
        swap = asyncio.create_task(change(client, "small", "load"))
        await state(client, "gemma-demo", "unloading")
        ready = await client.get("/health/ready")
        assert ready.status_code == 503 and "3 requests of gemma-demo" in ready.json()["phase"]
        assert (await client.get("/health/live")).status_code == 200
        assert error_of(await ask(client, "small"))[:2] == (503, "engine_loading")
        assert not first.stopped
        first.go_on.set()
        assert [said(answer) for answer in await asyncio.gather(*running)] == ["I am gemma-demo"] * 3
        assert (await swap).status_code == 200
        assert first.stopped and said(await ask(client)) == "I am small"


async def test_requests_that_take_too_long_are_told_so() -> None:
    async with serving_models(loading={"drain_seconds": 0.1}) as (client, shelf):
        shelf.running.hang_at = 0
        running = asyncio.create_task(ask(client))
        await until(lambda: shelf.running.hanging == 1)
        assert (await change(client, "small", "load")).status_code == 200
        assert error_of(await running)[:2] == (503, "model_not_loaded")
        assert said(await ask(client)) == "I am small"


async def test_two_loads_at_once() -> None:
    async with serving_models() as (client, shelf):
        ready = asyncio.Event()
        shelf.prepare("small", lambda engine: setattr(engine, "loads", ready))
        assert (await client.post("/v1/models/small/load")).status_code == 202
        await state(client, "small", "loading")
        for path in ("big/load", "small/load", "gemma-demo/unload", "small/unload"):
            answer = await client.post(f"/v1/models/{path}")
            assert answer.status_code == 409, path
            assert "'small'" in answer.json()["error"]["message"]
        ready.set()
        await state(client, "small", "ready")
        assert (await change(client, "big", "load")).status_code == 200


async def test_only_what_is_configured_can_be_loaded() -> None:
    async with serving_models() as (client, shelf):
        made = len(shelf.made)
        for name in (
            "other/model",
            "%2Fetc%2Fpasswd",
            "..%2F..%2Fetc",
            "small%00",
            "small/load",
            "%F0%9F%92%A5",
        ):
            for what in ("load", "unload", "sleep", "wake"):
                answer = await client.post(f"/v1/models/{name}/{what}")
                assert answer.status_code == 404, (name, what)
        assert len(shelf.made) == made
        for body in ({"name": "../x", "path": "/x"}, {"name": "x", "path": ""}, {"name": "", "path": "/x"}):
            answer = await client.post("/v1/models/gemma-demo/adapters", json=body)
            assert answer.status_code == 400, body


async def test_a_load_goes_on_when_who_asked_for_it_leaves() -> None:
    async with serving_models() as (client, shelf):
        ready = asyncio.Event()
        shelf.prepare("small", lambda engine: setattr(engine, "loads", ready))
        asked = asyncio.create_task(change(client, "small", "load"))
        await state(client, "small", "loading")
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        ready.set()
        await state(client, "small", "ready")


async def test_what_cannot_be_loaded_does_not_interrupt_who_runs() -> None:
    async with serving_models() as (client, shelf):
        first = shelf.running
        shelf.prepare("small", lambda engine: setattr(engine, "faulty", "there is no such model"))
        answer = await change(client, "small", "load")
        assert error_of(answer)[:2] == (500, "model_load_failed")
        assert "there is no such model" in answer.json()["error"]["message"]
        assert (await state(client, "small", "unloaded"))["error"] == "there is no such model"
        assert shelf.running is first and said(await ask(client)) == "I am gemma-demo"


async def test_a_load_that_fails_brings_the_old_model_back() -> None:
    async with serving_models() as (client, shelf):
        first = shelf.running
        shelf.prepare("small", lambda engine: setattr(engine, "broken", "out of memory"))
        answer = await change(client, "small", "load")
        assert error_of(answer)[:2] == (500, "model_load_failed")
        assert "out of memory" in answer.json()["error"]["message"]
        assert first.stopped and shelf.running is not first
        assert said(await ask(client)) == "I am gemma-demo"
        assert (await client.get("/health/ready")).status_code == 200
        assert (await state(client, "small", "unloaded"))["error"] == "out of memory"
        assert "out of memory" in (await ask(client, "small")).json()["error"]["message"]
        shelf.prepare("small", lambda engine: None)
        assert (await change(client, "small", "load")).json()["error"] is None


async def test_without_an_old_model_to_go_back_to() -> None:
    async with serving_models() as (client, shelf):
        shelf.prepare("small", lambda engine: setattr(engine, "broken", "out of memory"))
        shelf.prepare("gemma-demo", lambda engine: setattr(engine, "broken", "the disk is gone"))
        assert (await change(client, "small", "load")).status_code == 500
        live = await client.get("/health/live")  # a restart may help
        assert live.status_code == 503 and "the disk is gone" in live.json()["reason"]


async def test_unload_and_load_again() -> None:
    async with serving_models() as (client, shelf):
        first = shelf.running
        answer = await change(client, "gemma-demo", "unload")
        assert (answer.status_code, answer.json()["state"]) == (200, "unloaded")
        assert first.stopped
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "unloaded")
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/health/metrics")).status_code == 200
        assert error_of(await ask(client))[:2] == (503, "model_not_loaded")
        assert (await change(client, "gemma-demo", "unload")).status_code == 200
        shelf.prepare("small", lambda engine: setattr(engine, "broken", "out of memory"))
        assert (await change(client, "small", "load")).status_code == 500
        assert (await client.get("/health/live")).status_code == 200  # nothing ran before
        assert (await change(client, "gemma-demo", "load")).status_code == 200
        assert said(await ask(client)) == "I am gemma-demo"


async def test_nothing_keeps_an_ended_engine_in_memory() -> None:
    async with serving_models() as (client, shelf):
        assert said(await ask(client)) == "I am gemma-demo"
        engine = shelf.made.pop()
        engine.part = engine  # type: ignore[attr-defined]  # the parts of vLLM's know each other too
        ended = weakref.ref(engine)
        del engine
        gc.freeze()  # as an engine does that begins to serve
        assert (await change(client, "small", "load")).status_code == 200
        assert ended() is None


async def test_autoload() -> None:
    async with serving_models(loading={"autoload": True, "wait_seconds": 20}) as (client, shelf):
        answers = await asyncio.gather(*(ask(client, "small") for _ in range(4)))
        assert [said(answer) for answer in answers] == ["I am small"] * 4
        names = ["gemma-demo", "small", "big"] * 4
        answers = await asyncio.gather(*(ask(client, name) for name in names))
        assert [said(answer) for answer in answers] == [f"I am {name}" for name in names]
        shelf.prepare("big", lambda engine: setattr(engine, "faulty", "there is no such model"))
        await change(client, "small", "load")
        made = len(shelf.made)
        for _ in range(3):
            answer = await ask(client, "big")
            assert error_of(answer)[:2] == (503, "model_not_loaded")
            assert "there is no such model" in answer.json()["error"]["message"]
        assert len(shelf.made) == made + 1  # tried once, not for each request


async def test_autoload_without_waiting() -> None:
    async with serving_models(loading={"autoload": True}) as (client, _):
        assert error_of(await ask(client, "small"))[:2] == (503, "engine_loading")
        await state(client, "small", "ready")
        assert said(await ask(client, "small")) == "I am small"


async def test_who_waits_is_bounded_in_time_and_number() -> None:
    sections = {"loading": {"wait_seconds": 3}, "queue": {"max_requests": 2}}
    async with serving_models(**sections) as (client, shelf):
        shelf.prepare("small", lambda engine: setattr(engine, "loads", asyncio.Event()))
        await client.post("/v1/models/small/load")
        await state(client, "small", "loading")
        answers = await asyncio.gather(*(ask(client, "small") for _ in range(5)))
        codes = sorted(str(error_of(answer)[1]) for answer in answers)
        assert codes == ["engine_loading"] * 2 + ["engine_overloaded"] * 3


async def test_sleep_and_wake() -> None:
    async with serving_models() as (client, shelf):
        answer = await change(client, "gemma-demo", "sleep", level=2)
        assert (answer.status_code, answer.json()["state"]) == (200, "sleeping")
        assert shelf.running.asleep == 2
        assert (await client.get("/health/ready")).json()["status"] == "sleeping"
        answer = await ask(client)
        assert error_of(answer)[:2] == (503, "model_not_loaded")
        assert "/wake" in answer.json()["error"]["message"]
        assert (await change(client, "gemma-demo", "sleep")).status_code == 200
        assert (await change(client, "gemma-demo", "wake")).json()["state"] == "ready"
        assert shelf.running.asleep == 0 and said(await ask(client)) == "I am gemma-demo"
        await change(client, "gemma-demo", "sleep")
        assert (await change(client, "small", "load")).json()["state"] == "ready"
        assert error_of(await change(client, "gemma-demo", "sleep"))[:2] == (503, "model_not_loaded")
        assert (await change(client, "small", "sleep", level=3)).status_code == 400


async def test_where_the_engine_cannot_sleep() -> None:
    async with serving_models() as (client, shelf):
        shelf.running.can_sleep = False
        assert (await change(client, "gemma-demo", "sleep")).status_code == 501
        assert said(await ask(client)) == "I am gemma-demo"


async def test_adapters() -> None:
    async with serving_models() as (client, shelf):
        path = "/v1/models/gemma-demo/adapters"
        answer = await client.post(path, json={"name": "polite", "path": "/adapters/polite"})
        assert answer.status_code == 200, answer.text
        assert (answer.json()["parent"], answer.json()["state"]) == ("gemma-demo", "ready")
        ids = [row["id"] for row in (await client.get("/v1/models")).json()["data"]]
        assert ids == ["gemma-demo", "small", "big", "polite"]
        assert (await ask(client, "polite")).json()["model"] == "polite"
        for name in ("polite", "small", "gpt-small"):
            assert (await client.post(path, json={"name": name, "path": "x"})).status_code == 409
        for body in ({"name": "a/b", "path": "x"}, {"name": "a"}, {"name": "rude", "path": "missing"}):
            assert (await client.post(path, json=body)).status_code == 400, body
        assert (await client.get("/v1/models/rude")).status_code == 404

        await change(client, "small", "load")
        assert (await state(client, "polite", "unloaded"))["parent"] == "gemma-demo"
        assert error_of(await ask(client, "polite"))[:2] == (503, "model_not_loaded")
        await change(client, "gemma-demo", "load")
        await state(client, "polite", "ready")  # it came back with its model
        assert shelf.running.adapters == {"polite": "/adapters/polite"}

        assert (await client.delete(f"{path}/polite")).status_code == 204
        assert shelf.running.adapters == {}
        assert (await client.delete(f"{path}/polite")).status_code == 404
        assert error_of(await ask(client, "polite"))[:2] == (404, "model_not_found")


async def test_the_old_model_is_the_default_while_the_new_ones_configuration_is_checked() -> None:
    async with serving_models() as (client, shelf):
        shelf.prepare("small", lambda engine: engine.checks.clear())
        await client.post("/v1/models/small/load")
        await until(lambda: len(shelf.made) == 2)
        assert said(await ask(client)) == "I am gemma-demo"
        refused = await client.post("/v1/models/big/load")
        assert error_of(refused)[0] == 409 and "loading 'small'" in error_of(refused)[2]
        shelf.made[-1].checks.set()
        await state(client, "small", "ready")
        assert said(await ask(client)) == "I am small"


async def test_an_adapter_that_could_not_be_taken_away_is_still_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving_models() as (client, shelf):
        path = "/v1/models/gemma-demo/adapters"
        await client.post(path, json={"name": "polite", "path": "/adapters/polite"})

        async def refuse(name: str) -> None:
            raise EngineDied("it died")

        with monkeypatch.context() as patch:
            patch.setattr(shelf.running, "unload_adapter", refuse)
            assert (await client.delete(f"{path}/polite")).status_code == 503
        assert said(await ask(client, "polite"))
        assert (await client.delete(f"{path}/polite")).status_code == 204


async def test_an_adapter_is_not_taken_away_while_it_is_loaded() -> None:
    async with serving_models() as (client, shelf):
        path = "/v1/models/gemma-demo/adapters"
        shelf.running.adapters_load.clear()
        asked = asyncio.create_task(client.post(path, json={"name": "polite", "path": "/polite"}))
        await state(client, "polite", "unloaded")
        assert (await client.delete(f"{path}/polite")).status_code == 409
        shelf.running.adapters_load.set()
        assert (await asked).status_code == 200

        await client.post(path, json={"name": "rude", "path": "/rude"})
        await change(client, "small", "load")
        shelf.prepare("gemma-demo", lambda engine: engine.adapters_load.clear())
        await client.post("/v1/models/gemma-demo/load")
        await until(lambda: shelf.made[-1].settings.model.id == "gemma-demo" and shelf.made[-1].status.ready)
        for name in ("polite", "rude"):  # the second waits for the first
            assert (await client.delete(f"{path}/{name}")).status_code == 409
        shelf.running.adapters_load.set()
        await state(client, "rude", "ready")
        assert (await client.delete(f"{path}/polite")).status_code == 204
        assert shelf.running.adapters == {"rude": "/rude"}


async def test_an_adapter_of_a_model_that_loads_is_loaded_once() -> None:
    async with serving_models(loading={"wait_seconds": 20}) as (client, shelf):
        ready = asyncio.Event()
        shelf.prepare("small", lambda engine: setattr(engine, "loads", ready))
        await client.post("/v1/models/small/load")
        await state(client, "small", "loading")
        body = {"name": "polite", "path": "/polite"}
        asked = asyncio.create_task(client.post("/v1/models/small/adapters", json=body))
        await state(client, "polite", "unloaded")
        ready.set()
        answer = await asked
        assert (answer.status_code, answer.json()["state"]) == (200, "ready"), answer.text
        assert shelf.running.adapters == {"polite": "/polite"}
        await state(client, "small", "ready")
        assert said(await ask(client, "polite")) == "I am small"


async def test_a_model_that_slept_through_what_it_had_to_abandon_wakes() -> None:
    async with serving_models(loading={"drain_seconds": 0.1}) as (client, shelf):
        shelf.running.hang_at = 0
        running = asyncio.create_task(ask(client))
        await until(lambda: shelf.running.hanging == 1)
        assert (await change(client, "gemma-demo", "sleep")).json()["state"] == "sleeping"
        assert error_of(await running)[:2] == (503, "model_not_loaded")
        shelf.running.hang_at = None
        assert (await change(client, "gemma-demo", "wake")).json()["state"] == "ready"
        assert said(await ask(client)) == "I am gemma-demo"


async def test_autoload_while_the_first_model_still_loads() -> None:
    settings = Settings(
        model={"name": "gemma-demo"}, models=LISTED, loading={"autoload": True, "wait_seconds": 20}
    )
    shelf, ready = Shelf(), asyncio.Event()
    shelf.prepare("gemma-demo", lambda engine: setattr(engine, "loads", ready))
    app = create_app(settings, make_engine=shelf.make)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        asked = asyncio.create_task(ask(client, "small"))
        hasty = await client.post("/v1/models/small/load")  # what an operator asks for is refused
        assert hasty.status_code == 409
        ready.set()
        assert said(await asked) == "I am small"


async def test_who_waits_is_bounded_in_bytes() -> None:
    sections = {"loading": {"wait_seconds": 3}, "queue": {"max_tokens": 500}}
    async with serving_models(**sections) as (client, shelf):
        shelf.prepare("small", lambda engine: setattr(engine, "loads", asyncio.Event()))
        await client.post("/v1/models/small/load")
        await state(client, "small", "loading")
        answers = await asyncio.gather(*(ask(client, "small", user="x" * 1200) for _ in range(3)))
        codes = sorted(str(error_of(answer)[1]) for answer in answers)
        assert codes == ["engine_loading", *["engine_overloaded"] * 2]


async def test_a_key_is_told_of_its_own_models_only(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    write_keys(keys, [KeyEntry(name="few", sha256=digest_of(KEY).hex(), models=("small",))])
    async with serving_models(security={"api_keys_file": keys}) as (client, _):
        body = {"model": "none", "messages": [{"role": "user", "content": "Hi"}]}
        answer = await client.post(CHAT, json=body, headers=bearer(KEY))
        message = error_of(answer)[2]
        assert answer.status_code == 404 and "'small'" in message and "gemma-demo" not in message


async def test_a_chat_is_cut_to_the_context_of_the_model_that_it_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def relay(engine: Engine, kind: RelayKind, body: dict[str, Any]) -> dict[str, Any]:
        return {"count": sum(len(message["content"]) for message in body["messages"])}

    monkeypatch.setattr(Engine, "relay", relay)
    history = [{"role": role, "content": "x" * 100} for role in ("user", "assistant") * 5]
    async with (
        serving_models(loading={"autoload": True, "wait_seconds": 20}) as (client, _),
        chatting(str(client.base_url).rstrip("/")) as chat,
    ):
        for model, replies in (
            ("gemma-demo", ["token", "message"]),
            ("small", ["trimmed", "token", "message"]),
        ):
            await chat.ask("load", messages=history)
            await chat.send("chat", message="Hi", model=model)  # of 4096 tokens, and of 512
            assert [reply["type"] for reply in await chat.replies()] == replies


async def test_only_admins_change_models(file: Path) -> None:  # noqa: F811
    async with serving_models(security={"api_keys_file": file}) as (client, _):
        for method, path in (
            ("POST", "/v1/models/small/load"),
            ("POST", "/v1/models/gemma-demo/unload"),
            ("POST", "/v1/models/gemma-demo/sleep"),
            ("POST", "/v1/models/gemma-demo/wake"),
            ("POST", "/v1/models/gemma-demo/adapters"),
            ("DELETE", "/v1/models/gemma-demo/adapters/x"),
        ):
            assert (await client.request(method, path)).status_code == 401, path
            assert (await client.request(method, path, headers=bearer(KEY))).status_code == 403, path
        admin = bearer("sk-test-admin-0123456789")
        assert (await client.post("/v1/models/small/load?wait=true", headers=admin)).status_code == 200


async def test_a_reload_empties_the_cache_of_that_model() -> None:
    async with serving_models(cache={"enabled": True}) as (client, shelf):
        shelf.prepare("small", lambda engine: setattr(engine, "model", LoadedModel("small's")))
        assert (await ask(client, temperature=0)).headers["x-cache"] == "miss"
        assert (await ask(client, temperature=0)).headers["x-cache"] == "hit"
        await change(client, "small", "load")
        assert (await ask(client, "gemma-demo", temperature=0)).status_code == 503  # not from the cache
        answer = await ask(client, "small", temperature=0)
        assert (answer.headers["x-cache"], said(answer)) == ("miss", "I am small")
        await change(client, "gemma-demo", "load")
        assert (await ask(client, temperature=0)).headers["x-cache"] == "miss"


async def test_the_server_ends_in_the_midst_of_a_load() -> None:
    async with serving_models() as (client, shelf):
        shelf.prepare("small", lambda engine: setattr(engine, "loads", asyncio.Event()))
        await client.post("/v1/models/small/load")
        await state(client, "small", "loading")
    assert all(engine.stopped for engine in shelf.made if hasattr(engine, "_loading"))


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_operators_and_clients_do_at_once(seed: int) -> None:
    """One engine at a time, no request lost or answered by another model, and it works in the end."""
    chance = random.Random(seed)
    names = ["gemma-demo", "small", "big"]
    autoload = seed % 2 == 1
    loading = {"autoload": autoload, "wait_seconds": chance.choice([0, 0.05, 20]), "drain_seconds": 0.05}
    async with serving_models(loading=loading, cache={"enabled": True}) as (client, shelf):

        def ran() -> set[str]:
            return {one.settings.model.id for one in shelf.made if one.ran}

        def mishap(engine: Engine) -> None:
            engine._pause = chance.choice([0, 0.001, 0.08])  # the last is longer than the drain
            if chance.random() < 0.2:
                engine.faulty = "bad luck"
            elif chance.random() < 0.2 and engine.settings.model.id not in ran():
                engine.broken = "bad luck"  # one that ran starts again, or the server would end

        for name in names:
            shelf.prepare(name, mishap)

        async def operator() -> None:
            for _ in range(12):
                what = chance.choice(["load"] * 4 + ["unload", "sleep", "wake"])
                answer = await change(client, chance.choice(names), what, wait=chance.random() < 0.7)
                assert answer.status_code in (200, 202, 409, 500, 503), answer.text
                await asyncio.sleep(chance.random() * 0.02)

        async def customer() -> None:
            for number in range(30):
                name = chance.choice(names)
                answer = await ask(client, name, temperature=chance.choice([0, 1]), seed=number % 3)
                if answer.status_code == 200:
                    assert said(answer) == f"I am {name}"
                else:
                    codes = ("model_not_loaded", "engine_loading")
                    assert answer.status_code == 503 and error_of(answer)[1] in codes, answer.text
                await asyncio.sleep(chance.random() * 0.01)

        async def witness() -> None:
            while True:
                begun = [one for one in shelf.made if hasattr(one, "_loading")]
                assert sum(not one.stopped for one in begun) <= 1
                await asyncio.sleep(0)

        watching = asyncio.create_task(witness())
        await asyncio.gather(operator(), operator(), *(customer() for _ in range(6)))
        assert not watching.done()
        watching.cancel()
        for name in names:
            shelf.prepare(name, lambda engine: None)
        async with asyncio.timeout(20):
            while (await change(client, "big", "load")).status_code != 200:
                await asyncio.sleep(0.02)
        assert said(await ask(client, "big")) == "I am big"


def test_settings_of_each_model() -> None:
    settings = Settings(model={"name": "org/first"}, engine={"max_num_seqs": 8}, models=LISTED)
    of = settings.of_models()
    assert list(of) == ["first", "small", "big"]
    assert of["small"].engine == {} and of["big"].engine == {"max_num_seqs": 4}
    assert of["small"].model.id == "small" and of["small"].model.name == "org/small"
    assert of["small"].queue is settings.queue


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        (
            "a: {name: x, max_lenght: 5}",
            "models.a.max_lenght (from {file}): no such setting; did you mean max_length?",
        ),
        (
            "a: {name: x, max_length: five}",
            "models.a.max_length (from {file}) = 'five': must be a valid integer",
        ),
        ("a: {name: x, served_name: b}", "the name that it is listed under is the one it is served by"),
        ("a: {name: x, aliases: [gemma-demo]}", "models.a: the name 'gemma-demo' is gemma-demo's already"),
        ("a: {name: x, engine: {max_seqs: 1}}", "engine.max_seqs is not an argument of vLLM's engine"),
        ("a: nothing", "models.a (from {file}) = 'nothing'"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, listed: str, told: str) -> None:
    config = tmp_path / "models.yaml"
    config.write_text(f"model: {{name: gemma-demo}}\nmodels:\n  {listed}\n")
    with pytest.raises(SettingsError) as caught:
        Settings.load(config=config, environ={}, env_file=None)
    assert told.replace("{file}", str(config)) in str(caught.value)

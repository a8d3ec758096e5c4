"""Models of Hugging Face, by a small hub of our own: tokens, revisions, and what cannot be had."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gemma_serve import demo_model

from .conftest import ROOT, clean_environ

TOKEN, COMMIT = "hf_right", "0123456789abcdef0123456789abcdef01234567"
CHECK = """
import asyncio, sys
from gemma_serve.engine.lifecycle import VLLMEngine
from gemma_serve.errors import StartupError
from gemma_serve.settings import Settings
for name, revision in (argument.split("@") for argument in sys.argv[1:]):
    try:
        asyncio.run(VLLMEngine(Settings(model={"name": name}, engine={"revision": revision})).check())
        print("loadable")
    except StartupError as error:
        print(error)
"""


class Hub:
    """Two gated models, of which `org/listed` shows its files' names. `asked` is what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path)
                opened = self.headers.get("authorization") == f"Bearer {TOKEN}"
                if "org/gated" not in self.path and "org/listed" not in self.path:
                    self._answer(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})
                elif f"/tree/{COMMIT}" in self.path and (opened or "org/listed" in self.path):
                    files = [{"type": "file", "oid": "0", "size": 1, "path": "config.json"}]
                    self._answer(200, {"Content-Type": "application/json"}, json.dumps(files).encode())
                elif not opened:
                    self._answer(
                        403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
                    )
                elif self.path.endswith(f"/resolve/{COMMIT}/config.json"):
                    body = (demo_model.PATH / "config.json").read_bytes()
                    self._answer(200, {"ETag": '"1"', "X-Repo-Commit": COMMIT}, body)
                else:
                    self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

            do_HEAD = do_GET

            def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.05,))
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def check(home: Path, *models: str, **environ: str) -> list[str]:
    """What is said of each `name@revision`."""
    inherited = {name: value for name, value in clean_environ().items() if not name.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", CHECK, *models],
        env=inherited | {"HF_HOME": str(home), "PYTHONPATH": str(ROOT)} | environ,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert len(lines) == len(models), lines
    return lines


@pytest.mark.slow
def test_a_token_opens_a_gated_model_at_the_revision_that_was_named(hub: Hub, tmp_path: Path) -> None:
    model = f"org/gated@{COMMIT}"
    assert check(tmp_path, model, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN) == ["loadable"]
    assert any(path.endswith(f"/resolve/{COMMIT}/config.json") for path in hub.asked)
    hub.asked.clear()
    cached, missing = check(tmp_path, model, "org/missing@main", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert cached == "loadable" and "'org/missing' was found neither" in missing
    assert not hub.asked


@pytest.mark.slow
def test_what_cannot_be_had_is_one_sentence_that_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    models = [f"org/gated@{COMMIT}", f"org/listed@{COMMIT}", "org/missing@main"]
    *gated, missing = check(tmp_path, *models, HF_ENDPOINT=hub.url, HF_TOKEN="hf_wrong")
    for name, said in zip(("org/gated", "org/listed"), gated, strict=True):
        what = (
            f"{name} is a gated model: accept its licence at https://huggingface.co/{name} and set HF_TOKEN"
        )
        assert said == f"{what} to a token of that account"
    assert "'org/missing' was found neither as a local folder nor on Hugging Face" in missing

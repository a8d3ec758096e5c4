"""The pod of `helm test`: its program, run against a server that asks for a key or does not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from .conftest import EVERYTHING, RELEASE, Manifest, Render, component, container, pods

ANSWER = {"choices": [{"message": {"content": "Hi!"}}]}


class Handler(BaseHTTPRequestHandler):
    """Ready; chats with who has the key."""

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/health/ready" else 404, {"status": "ready"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and body["messages"]
        known = self.headers["Authorization"] == "Bearer right"
        self.answer(200 if known else 401, ANSWER if known else {})

    def answer(self, status: int, body: Manifest) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def the_test(manifests: list[Manifest]) -> Manifest:
    (pod,) = [pod for pod in pods(manifests) if component(pod) == "test"]
    return container(pod, "chat")


@pytest.mark.parametrize(
    ("key", "status", "says"),
    [("right", 0, "Hi!"), (None, 0, "asks for a key"), ("wrong", 1, "HTTP Error 401")],
)
def test_it_chats_or_says_what_it_lacks(
    render: Render, server: str, key: str | None, status: int, says: str
) -> None:
    test = the_test(render())
    assert test["command"] == ["python", "-c"]
    (program,) = test["args"]
    url = f"http://{RELEASE}-gemma-serve:80"
    assert program.count(url) == 1
    run = subprocess.run(
        [sys.executable, "-c", program.replace(url, server)],
        env={"KEY": key} if key else {},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode == status, run.stderr
    assert says in run.stdout + run.stderr


def test_its_key_comes_from_a_secret(render: Render) -> None:
    assert "env" not in the_test(render())
    (given,) = the_test(render(EVERYTHING))["env"]
    assert given == {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "tester", "key": "key"}}}


def test_it_speaks_tls_where_the_server_does(render: Render) -> None:
    (program,) = the_test(render({"tls": {"existingSecret": "certificate"}}))["args"]
    assert f'"https://{RELEASE}-gemma-serve:80"' in program

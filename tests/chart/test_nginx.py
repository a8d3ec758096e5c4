"""Two real replicas behind a real nginx, which is set up as the chart's Ingresses say, and one Redis."""

from __future__ import annotations

import collections
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from websockets.sync.client import connect

from ..chat_client import ws
from ..conftest import ServerProcess, running_redis, start
from ..processes import below
from .conftest import CHART, Manifest, Render, container, of_kind, read, servers, settings_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PREFIX = "nginx.ingress.kubernetes.io/"

# What the controller makes of an annotation: directives of a location, or of its upstream.
LOCATION = {
    "proxy-buffering": "proxy_buffering {}",
    "proxy-http-version": "proxy_http_version {}",
    "proxy-read-timeout": "proxy_read_timeout {}s",
    "proxy-send-timeout": "proxy_send_timeout {}s",
    "proxy-body-size": "client_max_body_size {}",
    "proxy-next-upstream": "proxy_next_upstream {}",
}
UPSTREAM = {"upstream-hash-by": "hash {} consistent"}

ALWAYS = [  # what ingress-nginx sets for every location, and which replica it was, for the tests
    "proxy_set_header Host $host",
    "proxy_set_header X-Forwarded-For $remote_addr",
    "proxy_set_header Upgrade $http_upgrade",
    "proxy_set_header Connection $connection_upgrade",
    "add_header X-Replica $upstream_addr always",
]


def block(head: str, *lines: str) -> str:
    body = "".join(line if line.endswith("}\n") else f"{line};\n" for line in lines)
    return f"{head} {{\n{body}}}\n"


def nginx_conf(ingresses: list[Manifest], replicas: list[str], folder: Path, port: int) -> str:
    upstreams, locations = [], []
    for ingress in ingresses:
        name = ingress["metadata"]["name"]
        given = {key.removeprefix(PREFIX): value for key, value in ingress["metadata"]["annotations"].items()}
        scheme = given.pop("backend-protocol").lower()
        assert given.keys() <= LOCATION.keys() | UPSTREAM.keys()
        hashing = [UPSTREAM[key].format(value) for key, value in given.items() if key in UPSTREAM]
        upstreams.append(
            block(f"upstream {name}", *hashing, *(f"server {replica} max_fails=0" for replica in replicas))
        )
        lines = [LOCATION[key].format(value) for key, value in given.items() if key in LOCATION]
        for path in ingress["spec"]["rules"][0]["http"]["paths"]:
            locations.append(
                block(f"location {path['path']}", *lines, f"proxy_pass {scheme}://{name}", *ALWAYS)
            )
    temporary = [
        f"{kind}_temp_path {folder}/{kind}" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    ]
    upgrade = block("map $http_upgrade $connection_upgrade", "default upgrade", "'' ''")
    site = block("server", f"listen 127.0.0.1:{port}", *locations)
    http = block("http", *temporary, "access_log off", upgrade, *upstreams, site)
    user = "user root;\n" if os.geteuid() == 0 else ""  # or its workers could not write to `folder`
    head = f"{user}daemon off;\npid {folder}/pid;\nerror_log stderr warn;\n"
    return head + block("events", "worker_connections 512") + http


@dataclass
class Stack:
    url: str
    replicas: list[ServerProcess]
    folder: Path

    def processes(self) -> list[psutil.Process]:
        """Of both engines."""
        return [child for each in self.replicas for child in below(each.process.pid)]

    def client(self, address: str = "127.0.0.1", **options: Any) -> httpx.Client:
        """One that comes from an address of its own, all of 127.0.0.0/8 being this machine."""
        transport = httpx.HTTPTransport(local_address=address)
        return httpx.Client(base_url=self.url, transport=transport, timeout=120, **options)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def stack(render: Render, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("nginx")
    values = {
        "replicas": 2,
        "redis": {"deploy": True},
        "ingress": {"enabled": True, "hosts": ["gemma.example.com"]},
        "config": {
            "security": {"rate_limit_per_minute": 6, "trusted_proxies": ["127.0.0.0/8"]},
            "server": {"keep_alive_seconds": 0.5, "drain_delay_seconds": 0},
            "engine": {"kv_cache_memory_bytes": 100_000_000, "max_num_seqs": 8},
        },
    }
    manifests = render(read(CHART / "values-cpu-demo.yaml"), values)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings_file(manifests)), encoding="utf8")
    given = {item["name"]: item["value"] for item in container(servers(manifests)[0])["env"]}
    ports = free_ports(3)
    with ExitStack() as ending:
        redis = ending.enter_context(running_redis(folder / "redis"))
        environ = {name: value for name, value in given.items() if name.startswith("GEMMA_")}
        assert environ.keys() == {"GEMMA_STORAGE_URL", "GEMMA_STORAGE_PREFIX"}
        environ |= {"GEMMA_STORAGE_URL": redis, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        script = str(Path(sys.executable).with_name("gemma-server"))
        replicas = []
        for port in ports[:2]:
            options = (script, "serve", "--config", str(config), "--host", "127.0.0.1", "--port", str(port))
            replicas.append(start(*options, environ=environ))
            ending.callback(replicas[-1].end)
        addresses = [f"127.0.0.1:{port}" for port in ports[:2]]
        (folder / "nginx.conf").write_text(
            nginx_conf(of_kind(manifests, "Ingress"), addresses, folder, ports[2])
        )
        with (folder / "nginx.log").open("w") as log:
            nginx = subprocess.Popen(["nginx", "-c", folder / "nginx.conf", "-p", folder], stderr=log)
        ending.callback(nginx.wait, 30)
        ending.callback(nginx.terminate)
        for replica in replicas:
            replica.wait_ready()
        assert nginx.poll() is None, (folder / "nginx.log").read_text()
        yield Stack(f"http://127.0.0.1:{ports[2]}", replicas, folder)


BODY = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4, "ignore_eos": True}


def test_both_answer_and_share_the_limits(stack: Stack) -> None:
    with stack.client("127.0.1.1") as client:
        answers = [client.post("/v1/chat/completions", json=BODY) for _ in range(8)]
    assert [answer.status_code for answer in answers] == [200] * 6 + [429] * 2
    assert len({answer.headers["x-replica"] for answer in answers}) == 2
    with stack.client("127.0.1.2") as client:  # another client, by X-Forwarded-For
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200


def test_a_stream_is_not_buffered(stack: Stack) -> None:
    """While both engines are frozen, the server's comments come through."""
    body = BODY | {"stream": True}
    with stack.client("127.0.2.1") as client:
        freeze(stack, signal.SIGSTOP)
        try:
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                texts = answer.iter_text()
                assert next(texts).startswith(": keep-alive")
                freeze(stack, signal.SIGCONT)
                assert "[DONE]" in "".join(texts)
        finally:
            freeze(stack, signal.SIGCONT)


def freeze(stack: Stack, order: signal.Signals) -> None:
    for process in stack.processes():
        os.kill(process.pid, order)


def test_sticky_paths_lead_to_one_replica(stack: Stack) -> None:
    """A client's WebSockets, one after the other, as its other requests below the path."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for address in (f"127.0.3.{number + 1}" for number in range(30)):
        with stack.client(address) as client:
            found[address].add(client.get("/ws/none").headers["x-replica"])
        for _ in range(2):
            with connect(ws(stack.url), source_address=(address, 0), proxy=None) as chat:
                assert json.loads(chat.recv(timeout=60))["type"] == "session"
                assert chat.response
                found[address].add(chat.response.headers["X-Replica"])
    assert all(len(replicas) == 1 for replicas in found.values())
    assert len(set.union(*found.values())) == 2  # and not all to the same


def test_bodies_may_be_as_large_as_the_server_takes(stack: Stack) -> None:
    """nginx's own limit would be 1 MB."""
    with stack.client("127.0.4.1") as client:
        small = client.post("/v1/chat/completions", json=BODY | {"user": "x" * 2_000_000})
        assert small.status_code == 200, small.text
        long = client.post("/v1/chat/completions", content=b"x" * 10_000_001)
    assert long.status_code == 413


def test_a_replica_that_ends_is_left_out(stack: Stack) -> None:
    """nginx asks the other one where no connection can be made: nobody notices."""
    gone = stack.replicas[0]
    assert gone.end() == 0
    deadline = time.monotonic() + 10
    while gone.process.poll() is None:
        assert time.monotonic() < deadline
    for number in range(4):
        with stack.client(f"127.0.5.{number + 1}") as client:
            assert client.post("/v1/chat/completions", json=BODY).status_code == 200

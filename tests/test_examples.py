"""The example client, as a person runs it."""

from __future__ import annotations

import runpy
import socket
import subprocess
import sys

import pytest

from .conftest import ROOT, ServerProcess

CLIENT = ROOT / "examples" / "server_client.py"


def run(*arguments: str, seconds: float = 150) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, CLIENT, *arguments],
        capture_output=True,
        text=True,
        encoding="utf8",
        timeout=seconds,
    )


@pytest.mark.slow
def test_the_tour_passes(live: ServerProcess) -> None:
    tour = run(live.url)
    assert tour.returncode == 0, tour.stdout + tour.stderr
    assert not tour.stderr
    names = [part.__name__ for part in runpy.run_path(str(CLIENT))["PARTS"]]
    assert f"all {len(names)} parts passed" in tour.stdout
    assert tour.stdout.count("  ✓ ") == len(names) > 5
    for name in names:
        assert f"\n{name.replace('_', ' ')}\n" in tour.stdout


@pytest.mark.slow
def test_the_tour_works_with_a_v1_url_and_an_alias(live: ServerProcess) -> None:
    tour = run(f"{live.url}/v1/", "--model", "gpt-4o-mini", "--api-key", "a-secret")
    assert tour.returncode == 0, tour.stdout + tour.stderr
    assert "a-secret" not in tour.stdout


@pytest.mark.slow
def test_a_model_that_is_not_served_is_one_sentence(live: ServerProcess) -> None:
    tour = run(live.url, "--model", "no-such-model")
    assert_one_sentence(tour, "no-such-model")


def test_no_server_is_one_sentence() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken and not listening: nobody else can answer there
        tour = run(f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert_one_sentence(tour, "there is no server at http://127.0.0.1")
    assert "make serve" in tour.stderr


def test_a_wrong_url_is_one_sentence() -> None:
    assert_one_sentence(run("ftp://127.0.0.1"), "ftp://127.0.0.1")


def test_a_server_that_is_none_of_ours_is_one_sentence() -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        port = process.stdout.readline().split(" port ")[1].split()[0]
        tour = run(f"127.0.0.1:{port}")
        process.terminate()
    assert_one_sentence(tour, f"http://127.0.0.1:{port}")


def test_a_server_that_goes_on_loading_is_not_waited_for_in_vain() -> None:
    loading = (
        'HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n\r\n{"status":"loading","phase":"weights"}'
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, CLIENT, url, "--wait", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        listener.settimeout(60)
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(loading.encode())
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith(f"server_client: the server at {url} is still loading, weights")
    assert "Traceback" not in output + errors


def test_help_teaches() -> None:
    answer = run("--help")
    assert answer.returncode == 0
    for word in ("examples:", "--model", "--api-key", "--wait", "make serve", "http://localhost:8000"):
        assert word in answer.stdout


def assert_one_sentence(tour: subprocess.CompletedProcess[str], about: str) -> None:
    assert tour.returncode == 1
    assert tour.stderr.startswith("server_client: ") and about in tour.stderr
    assert tour.stderr.count("\n") == 1, tour.stderr
    assert "Traceback" not in tour.stdout + tour.stderr

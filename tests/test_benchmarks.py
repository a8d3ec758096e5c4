"""The benchmarks run; what they measure is judged by nobody here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare_vllm

from .conftest import ROOT


def test_request_cost() -> None:
    command = [sys.executable, "benchmarks/request_cost.py", "--requests", "50", "--rounds", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "10,000 keys" in result.stdout
    print(result.stdout)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_health_latency() -> None:
    options = ["--streams", "16", "--seconds", "2", "--null"]
    command = [sys.executable, "-m", "benchmarks.health_latency", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["busy"]["probes"] > 0 and found["busy"]["not_ready"] == 0
    assert found["tokens_per_second"] > 0
    print(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--engines", "gpu"], "needs --model"),
        (["--engines", "gpu", "--model", "folder", "--ceiling"], "embedded model"),
        (["--engines", "demo"], "apt-get install -y g++"),
    ],
)
def test_what_cannot_be_compared_is_said_at_once(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no compiler, no nvidia-smi
    monkeypatch.setattr("sys.argv", ["compare_vllm.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        compare_vllm.main()
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_load_client_may_open_more_files_than_a_login_shell() -> None:
    command = 'ulimit -Sn 64 && ulimit -Hn 512 && exec "$0" -c "$1"'
    code = (
        "import resource, runpy, sys\n"
        "sys.argv = ['', 'http://127.0.0.1:1']\n"
        "try:\n    runpy.run_path('benchmarks/stream_client.py', run_name='__main__')\n"
        "except OSError:\n    print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    arguments = ["sh", "-c", command, sys.executable, code]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "(512, 512)", result.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compare_vllm(tmp_path: Path) -> None:
    plot = tmp_path / "cost.svg"
    options = ["--engines", "null", "--clients", "4", "--requests", "8", "--tokens", "8", "--rounds", "1"]
    command = [sys.executable, "benchmarks/compare_vllm.py", *options, "--plot", str(plot)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("| null |")]
    assert len(rows) == 2
    assert "ours, null, streamed" in plot.read_text(encoding="utf8")
    assert all(row.endswith("| 0 |") for row in rows), "answers are missing"
    print(result.stdout)

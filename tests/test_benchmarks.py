"""The benchmarks run; what they measure is judged by nobody here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compare_vllm() -> None:
    options = ["--engines", "null", "--clients", "4", "--requests", "8", "--tokens", "8", "--rounds", "1"]
    command = [sys.executable, "benchmarks/compare_vllm.py", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("| null |")]
    assert len(rows) == 2
    assert all(row.endswith("| 0 |") for row in rows), "answers are missing"
    print(result.stdout)

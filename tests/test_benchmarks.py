"""The benchmarks run; what they measure is judged by nobody here."""

from __future__ import annotations

import subprocess
import sys

from .conftest import ROOT


def test_request_cost() -> None:
    command = [sys.executable, "benchmarks/request_cost.py", "--requests", "50", "--rounds", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "10,000 keys" in result.stdout
    print(result.stdout)

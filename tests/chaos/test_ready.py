"""A busy server is a healthy one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ..conftest import ROOT
from .conftest import FULL


@pytest.mark.skipif(not FULL, reason="`make chaos` runs it; CI has 16 streams, in test_benchmarks.py")
def test_ready_does_not_flap_under_256_streams() -> None:
    command = [sys.executable, "benchmarks/health_latency.py", "--streams", "256", "--seconds", "60"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    print(found)
    assert found["busy"]["probes"] > 100 and found["busy"]["not_ready"] == 0

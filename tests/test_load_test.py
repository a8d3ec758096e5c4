"""`make load-test`: its thresholds and report, and the tools themselves where they are installed."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import run
from benchmarks.load.run import faults_of, model_of, report

from .conftest import ROOT, ServerProcess, start_fake

PYTHON = ROOT / ".cache" / "load-test" / "bin" / "python"


def result(profile: str, **more: Any) -> dict[str, Any]:
    return {"profile": profile, "requests": 100, "errors": 0, "ttft_p95_ms": 100.0, **more}


def options(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(
        url="http://host<1>:8000",
        model="gemma",
        out=folder,
        max_failure_share=0.01,
        ttft_p95_ms=500.0,
    )


def test_thresholds(tmp_path: Path) -> None:
    given = options(tmp_path)
    assert faults_of([result("sweep", ttft_p95_ms=9e9), result("constant"), result("poisson")], given) == []
    assert "TTFT p95 600 ms" in faults_of([result("poisson", ttft_p95_ms=600.0)], given)[0]
    assert "2 errors" in faults_of([result("constant", errors=2)], given)[0]
    assert faults_of([result("sweep", errors=50)], given) == [], "it goes on until the server refuses"
    assert "0 answers" in faults_of([result("constant", requests=0)], given)[0]


def test_the_report_says_what_was_not_kept(tmp_path: Path) -> None:
    report([result("constant", rate=None)], ["constant: <slow>"], options(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "constant: &lt;slow&gt;" in page
    assert "host&lt;1&gt;" in page and "host<1>" not in page
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["thresholds"] == ["constant: <slow>"]
    assert summary["about"]["cores"]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    started = start_fake()
    try:
        yield started
    finally:
        started.end()


def test_an_interrupted_run_reports_what_was_done_and_fails(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(profile: Any, *_: Any) -> list[dict[str, Any]]:
        if profile["kind"] == "sweep":
            return [result("sweep", requests_per_second=2.0)]
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "guidellm", interrupted)
    monkeypatch.setattr("sys.argv", ["run.py", server.url, "--out", str(tmp_path)])
    (tmp_path / "locust.txt").write_text("of an earlier run")
    assert run.main() == 1
    assert "the run was interrupted" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["thresholds"] == ["the run was interrupted"]
    assert [row["profile"] for row in summary["results"]] == ["sweep"]
    assert "an earlier run" not in (tmp_path / "report.html").read_text()


def test_without_a_url_nothing_is_installed() -> None:
    command = ["make", "--dry-run", "load-test", "URL="]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert "URL=http://host:port is missing" in ended.stderr
    assert "install" not in ended.stdout


def test_the_model_is_asked_for(server: ServerProcess) -> None:
    assert model_of(server.url, "") == "gemma-demo"
    with pytest.raises(SystemExit, match="does not answer"):
        model_of(f"{server.url}/nowhere", "")


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="`make load-test` installs the tools")
@pytest.mark.parametrize(("limit", "code"), [("60000", 0), ("0.0001", 1)])
def test_locusts_thresholds_set_the_exit_status(
    server: ServerProcess, tmp_path: Path, limit: str, code: int
) -> None:
    # The fake engine has no context to exceed, so that one of the abuser's requests is answered.
    command = [str(PYTHON), "benchmarks/load/run.py", server.url, "--only", "locust", "--seconds", "5"]
    command += ["--users", "10", "--max-failure-share", "0.5", "--ttft-p95-ms", limit, "--out", str(tmp_path)]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    with (tmp_path / "locust_stats.csv").open(newline="") as file:
        failures = {(row["Type"], row["Name"]): row["Failure Count"] for row in csv.DictReader(file)}
    assert failures["WS", "WebSocket chat"] == "0", ended.stdout
    assert (tmp_path / "locust.html").exists()
    assert ("TTFT p95" in ended.stdout) == bool(code)

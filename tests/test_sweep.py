"""The memory sweep: its report from given rows, and a run on the real engine that is killed and goes on."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import transformers
import yaml

from benchmarks import sweep_report, synthetic_model
from benchmarks.gpu_memory_sweep import Rows, Sweep, bandwidth_share, predicted_blocks
from benchmarks.machine import Peak, gpus, machine, memory_bandwidth, published_bandwidth
from benchmarks.server import free_port, running
from gemma_serve.engine.published import PUBLISHED
from gemma_serve.engine.shape import read_shape

from .conftest import ROOT

SLO = {"ttft_ms": 500.0, "inter_token_ms": 50.0}
MACHINE = {"memory_gb_per_second": 10.0, "date": "2026-01-31 12:00 UTC", "cpu": "a CPU", "cores": 2}


def row(memory: int, clients: int, speed: float, ttft: float = 100.0, **more: Any) -> dict[str, Any]:
    times = {
        f"{name}_{share}_ms": 20.0 for name in ("ttft", "inter_token") for share in ("p50", "p95", "p99")
    }
    return {
        "engine": {"kv_cache_memory_bytes": memory, "max_num_seqs": 64},
        "load": {"concurrency": clients, "prompt_tokens": 128, "output_tokens": 64},
        "requests": 10,
        "errors": 0,
        "seconds": 1.0,
        "output_tokens_per_second": speed,
        "total_tokens_per_second": 3 * speed,
        "goodput_requests_per_second": 1.0,
        "good_share": 1.0,
        "kv_blocks": 100,
        "predicted_kv_blocks": 100,
        "preemptions": 0,
        "prefix_hit_share": 0.5,
        "peak_gpu_bytes": None,
        "peak_rss_bytes": 1 << 30,
        **times,
        "ttft_p95_ms": ttft,
        **more,
    }


def test_the_smallest_setting_that_is_nearly_the_best_is_recommended() -> None:
    rows = [row(1 << 20, 8, 500), row(2 << 20, 8, 960), row(4 << 20, 8, 1000), row(4 << 20, 64, 2000, 900)]
    sentence = sweep_report.recommendation(rows, SLO)
    assert sentence.startswith("kv_cache_memory_bytes=2 MiB, max_num_seqs=64: 48% of the best throughput")
    assert "TTFT p95 <= 500 ms" in sentence
    assert sentence.endswith("with 8 clients.")


def test_where_nothing_is_fast_enough_the_nearest_is_named() -> None:
    sentence = sweep_report.recommendation([row(1 << 20, 64, 500, 5000), row(1 << 20, 8, 400, 700)], SLO)
    assert "No setting keeps" in sentence
    assert "with 8 clients, has TTFT p95 700 ms" in sentence


def test_a_setting_that_makes_errors_is_not_recommended() -> None:
    assert "No setting keeps" in sweep_report.recommendation([row(1, 8, 500, errors=1)], SLO)
    failed = {"engine": {"a": 1}, "load": None, "error": "no memory"}
    assert "Nothing was measured" in sweep_report.recommendation([failed], SLO)


def test_the_knee_is_where_more_clients_gain_little() -> None:
    speeds = {1: 100, 8: 700, 16: 900, 64: 1000}
    bend = sweep_report.knee([row(1, clients, speed) for clients, speed in speeds.items()])
    assert bend is not None and bend["load"]["concurrency"] == 16
    assert sweep_report.knee([row(1, 1, 100), row(1, 2, 200)]) is None
    assert sweep_report.knee([row(1, clients, 100) for clients in (1, 2, 3)]) is None


def test_the_front_has_what_none_beats() -> None:
    slow = row(1, 64, 1000, inter_token_p50_ms=50.0)
    fast = row(1, 1, 100, inter_token_p50_ms=10.0)
    beaten = row(1, 8, 90, inter_token_p50_ms=20.0)
    assert sweep_report.pareto([slow, fast, beaten]) == [slow, fast]


def test_the_report_has_every_row_and_every_plot(tmp_path: Path) -> None:
    head = {"sweep": Sweep(engine={}, slo=SLO).model_dump(), "machine": MACHINE}
    failed = {
        "engine": {"kv_cache_memory_bytes": 1, "max_num_seqs": 64},
        "load": None,
        "error": "too small",
    }
    rows = [row(1 << 20, clients, 100.0 * clients, predicted_kv_blocks=99) for clients in (1, 8, 64)]
    text = sweep_report.write(head, [*rows, failed], tmp_path)
    assert text == (tmp_path / "report.md").read_text()
    assert text.count("| kv_cache_memory_bytes=1 MiB") == 3
    assert "99 (-1.0%)" in text
    assert "- kv_cache_memory_bytes=1, max_num_seqs=64: too small" in text
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    for name in ("throughput_by_memory", "latency_by_concurrency", "throughput_by_concurrency", "pareto"):
        drawing = tmp_path / f"{name}.svg"
        assert drawing.read_text().startswith("<?xml")
        assert f"({drawing.name})" in text


def test_rows_survive_a_kill_in_the_midst_of_a_line(tmp_path: Path) -> None:
    sweep = Sweep(engine={"max_num_seqs": [1]})
    path = tmp_path / "rows.jsonl"
    engine, first, second = {"max_num_seqs": 1}, {"concurrency": 1}, {"concurrency": 2}
    Rows(path, sweep).add({"engine": engine, "load": first})
    with path.open("a") as file:
        file.write('{"engine": {"max_num')
    again = Rows(path, sweep)
    assert again.done(engine, first) and not again.done(engine, second)
    again.add({"engine": engine, "load": None, "error": "no memory"})
    assert Rows(path, sweep).done(engine, second), "what did not start is not started again"
    with pytest.raises(SystemExit, match="another sweep"):
        Rows(path, Sweep(engine={"max_num_seqs": [2]}))
    path.write_text('{"sweep": {"engi')
    assert Rows(path, sweep).rows == []
    assert json.loads(path.read_text())["machine"], "a head alone that was cut off is a new run"


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_file_is_valid(file: Path) -> None:
    sweep = Sweep.model_validate(yaml.safe_load(file.read_text()))
    assert list(sweep.engines()) and list(sweep.loads())


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-9b", "gemma-3-1b", "gemma-3-27b"])
def test_a_synthetic_model_has_the_shape_and_the_whole_vocabulary(name: str, tmp_path: Path) -> None:
    assert name in PUBLISHED
    folder = synthetic_model.make(name, tmp_path)
    shape, whole = read_shape(str(folder)), read_shape(name)
    assert shape.layers == whole.layers
    assert (shape.hidden_size, shape.heads) == (whole.hidden_size, whole.heads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == shape.vocabulary
    text = "Tell me a story, please."
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    last = shape.vocabulary - 1
    assert tokenizer.decode([last]) and tokenizer.decode([last]) != tokenizer.decode([last - 1])


def test_the_prediction_reads_the_engines_arguments() -> None:
    shape, row = read_shape("gemma-3-1b"), {"kv_block_tokens": 16}
    whole = predicted_blocks(shape, {"kv_cache_memory_bytes": 1 << 30}, row)
    eight_bits = predicted_blocks(shape, {"kv_cache_memory_bytes": 1 << 30, "kv_cache_dtype": "fp8"}, row)
    assert whole is not None and eight_bits == 2 * whole


def test_how_much_of_the_memorys_speed_one_chat_takes() -> None:
    shape = read_shape("gemma-3-1b")
    found = row(1, 1, 100.0, inter_token_p50_ms=10.0)
    share = bandwidth_share(shape, {}, found, 1000)
    # 999,885,952 parameters of 2 bytes in 10 ms: 200 GB/s; 160 tokens of 26 layers are little beside them.
    assert share is not None and share == pytest.approx(0.2, rel=0.03)
    both = bandwidth_share(shape, {"tensor_parallel_size": 2}, found, 1000)
    assert both == pytest.approx(share / 2, rel=1e-3)
    assert bandwidth_share(shape, {}, row(1, 8, 100.0), 1000) is None
    assert bandwidth_share(shape, {}, found, None) is None


def test_the_speed_of_the_memory() -> None:
    names = {
        "NVIDIA A100-SXM4-40GB": 1_555e9,
        "NVIDIA A100-SXM4-80GB": 2_039e9,
        "NVIDIA H100 80GB HBM3": 3_350e9,
        "NVIDIA GeForce RTX 4090": 1_008e9,
        "NVIDIA RTX 6000 Ada Generation": 960e9,
        "NVIDIA L4": 300e9,
        "NVIDIA T4": None,
    }
    assert {name: published_bandwidth(name) for name in names} == names
    if not gpus():
        assert 1e9 < (memory_bandwidth() or 0) < 1e12


def test_the_machine_is_recorded() -> None:
    found = machine()
    assert found["cores"] and found["vllm"]
    assert found["commit"] or not (ROOT / ".git").exists()
    peak = Peak(os.getpid())
    peak.look()
    assert peak.rss_bytes > 10_000_000


def test_what_nvidia_smi_does_not_tell_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA GB10, [N/A], [N/A]'\necho 'NVIDIA L4, 23034, 5'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpus() == [("NVIDIA GB10", None, None), ("NVIDIA L4", 23034 << 20, 5 << 20)]
    assert machine()["gpus"] == ["NVIDIA GB10", "NVIDIA L4, 23034 MiB"]
    peak = Peak(os.getpid())
    peak.look()
    program.write_text("#!/bin/sh\nexit 9\n")
    peak.look()
    assert peak.gpu_bytes == 5 << 20


SERVER = """
import http.server, subprocess, sys


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()


subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_the_engine_of_a_killed_server_is_ended(tmp_path: Path) -> None:
    port = free_port()
    with running(["-c", SERVER, str(port)], port, "", "any", tmp_path / "log", seconds=30) as server:
        (engine,) = psutil.Process(server.process.pid).children()
        server.process.kill()
        server.process.wait(10)
        assert engine.is_running()
    deadline = time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        while engine.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


CLIENTS = [1, 4, 8, 16]
QUICK = {
    "engine": {"kv_cache_memory_bytes": [1_000_000, 20_000_000], "max_num_seqs": [8]},
    "fixed": {"max_model_len": 512, "max_num_batched_tokens": 512, "enforce_eager": True},
    "load": {"concurrency": CLIENTS, "prompt_tokens": [64], "output_tokens": [32], "shared_tokens": 32},
    "slo": {"ttft_ms": 60_000, "inter_token_ms": 60_000},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    config, out = tmp_path / "sweep.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(QUICK))
    command = [sys.executable, "benchmarks/gpu_memory_sweep.py", str(config), "--out", str(out)]
    rows = out / "rows.jsonl"

    def measured() -> list[dict[str, Any]]:
        return [json.loads(line) for line in rows.read_text().splitlines()[1:]] if rows.exists() else []

    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 400
        while len(measured()) < 2 and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        first.wait(120)
    before = measured()
    assert 2 <= len(before) < 1 + len(CLIENTS), (tmp_path / "log").read_text()
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    after = measured()
    assert after[: len(before)] == before
    failed, *good = after
    assert failed["load"] is None and "KV cache" in failed["error"]
    assert [row["load"]["concurrency"] for row in good] == CLIENTS
    for each in good:
        assert each["errors"] == 0 and each["output_tokens_per_second"] > 0
        assert each["kv_blocks"] == each["predicted_kv_blocks"] > 0
    assert good[-1]["prefix_hit_share"] >= 0
    assert "kv_cache_memory_bytes=20000000, max_num_seqs=8: " in ended.stdout

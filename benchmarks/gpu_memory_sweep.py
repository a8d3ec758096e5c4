"""Tokens per second against memory settings: the server is started with each, and put under each load.

    python benchmarks/gpu_memory_sweep.py benchmarks/quick.yaml            on any machine, minutes
    python benchmarks/gpu_memory_sweep.py benchmarks/gpu_sweep.yaml --out benchmarks/out/h100

`--out` gets rows.jsonl, a line for each measurement as it ends, and rows.csv, report.md and plots made of it.
A run that was ended goes on where it was; a server that does not start is a row that says why. The report
alone: --report. What the file may hold is shown in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from benchmarks import sweep_report, synthetic_model
from benchmarks.machine import Peak, gpus, machine
from benchmarks.server import (
    ROOT,
    Server,
    StartFailed,
    end_on_signals,
    free_port,
    load,
    our_command,
    round_to,
    running,
)
from gemma_serve.engine.shape import Shape, read_shape
from gemma_serve.plan import GPU, KVCache, Options, plan

Cell = dict[str, Any]
_PLANNED = ("gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens")


class Load(BaseModel):
    """Every combination is a measurement; tokens are of each prompt and each answer."""

    model_config = ConfigDict(extra="forbid")

    concurrency: list[int] = [1, 8, 64]
    prompt_tokens: list[int] = [128]
    output_tokens: list[int] = [128]
    shared_tokens: int = 0
    requests: int = Field(default=2, description="of each client, on average")
    seed: int = 0


class SLO(BaseModel):
    """A request is good that keeps both; the report judges by the same figures at p95."""

    model_config = ConfigDict(extra="forbid")

    ttft_ms: float = 500.0
    inter_token_ms: float = 50.0


class Sweep(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = "gemma-demo"
    synthetic: str | None = Field(default=None, description="a published Gemma's shape, without weights")
    engine: dict[str, list[Any]]
    fixed: dict[str, Any] = {}
    load: Load = Load()
    slo: SLO = SLO()
    start_seconds: float = 900

    def engines(self) -> Iterator[Cell]:
        """Every combination of engine arguments; each is a start of the server."""
        for values in itertools.product(*self.engine.values()):
            yield dict(zip(self.engine, values, strict=True))

    def loads(self) -> Iterator[Cell]:
        names = ("concurrency", "prompt_tokens", "output_tokens")
        for values in itertools.product(*(getattr(self.load, name) for name in names)):
            yield dict(zip(names, values, strict=True))


class Rows:
    """rows.jsonl: the machine's line, then one a measurement."""

    def __init__(self, path: Path, sweep: Sweep) -> None:
        self._path = path
        self.rows: list[Cell] = []
        settings = sweep.model_dump(exclude={"start_seconds"})
        if path.exists() and (lines := _whole_lines(path)):
            first, *rest = map(json.loads, lines)
            if first["sweep"] != settings:
                raise SystemExit(f"{path} is of another sweep: name another --out, or remove it")
            self.head, self.rows = first, rest
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.head = {"sweep": settings, "machine": machine()}
            self._append(self.head)

    def add(self, row: Cell) -> None:
        self.rows.append(row)
        self._append(row)

    def done(self, engine: Cell, load: Cell) -> bool:
        return any(row["engine"] == engine and row["load"] in (load, None) for row in self.rows)

    def _append(self, row: Cell) -> None:
        with self._path.open("a", encoding="utf8") as file:
            file.write(json.dumps(row) + "\n")


def _whole_lines(path: Path) -> list[str]:
    """A run that was killed may leave half a line, which is cut off."""
    text = path.read_text(encoding="utf8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf8")
    return whole.splitlines()


def run(sweep: Sweep, rows: Rows, out: Path, *, quiet: bool = False) -> None:
    model = sweep.model
    if sweep.synthetic is not None:
        model = str(synthetic_model.make(sweep.synthetic, out / sweep.synthetic))
    loads = list(sweep.loads())
    todo = [(engine, [load for load in loads if not rows.done(engine, load)]) for engine in sweep.engines()]
    speed = rows.head["machine"].get("memory_gb_per_second")
    # A start counts as one step too: on a GPU it takes as long as a measurement.
    steps = sum(len(left) + 1 for _, left in todo if left)
    with tqdm(total=steps, unit="step", disable=quiet, file=sys.stderr, dynamic_ncols=True) as bar:
        for engine, left in todo:
            if left:
                bar.set_description(_words(engine))
                for row in _measure(sweep, model, engine, left, out, speed):
                    if row is None:
                        bar.update()
                        continue
                    rows.add(row)
                    bar.update(len(left) + 1 if row["load"] is None else 1)


def _measure(
    sweep: Sweep, model: str, engine: Cell, loads: list[Cell], out: Path, gb_per_second: float | None
) -> Iterator[Cell | None]:
    """A row for each load, after a None for the start; one row alone where the server does not start."""
    port, key, log = free_port(), f"sk-{secrets.token_hex(16)}", out / "server.log"
    given = sweep.fixed | engine
    settings: dict[str, Any] = {"model": {"name": model, "served_name": "swept"}, "engine": given}
    if "max_model_len" in given:  # which has a setting of its own here
        settings["model"]["max_length"] = given["max_model_len"]
        settings["engine"] = {name: value for name, value in given.items() if name != "max_model_len"}
    if sweep.synthetic is not None:
        settings["engine"] = {"load_format": "dummy", **settings["engine"]}
    command = our_command(settings, port, key, out / "server.yaml")
    started = time.monotonic()
    try:
        with running(command, port, key, "swept", log, sweep.start_seconds) as server:
            seconds = round_to(time.monotonic() - started)
            shape = read_shape(model)
            load(server, 4, 8, 8, *_prompts(sweep, loads[0], shape.vocabulary, seed=-1))  # warm
            yield None
            for cell in loads:
                row = {"engine": engine, "load": cell, "start_seconds": seconds}
                try:
                    row |= _loaded(sweep, server, cell, shape.vocabulary)
                    row["predicted_kv_blocks"] = predicted_blocks(shape, given, row)
                    row["bandwidth_share"] = bandwidth_share(shape, given, row, gb_per_second)
                except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                    row["error"] = _reason(f"{error}\n{log.read_text(errors='replace')[-3000:]}")
                yield row
    except (StartFailed, RuntimeError) as error:  # which it may also do at its first requests
        yield {"engine": engine, "load": None, "error": _reason(str(error))}


def _loaded(sweep: Sweep, server: Server, cell: Cell, vocabulary: int) -> Cell:
    before = server.metrics()
    clients = cell["concurrency"]
    # The same in every engine's run; another for each load, or the prefix cache would know its prompts.
    seed = sweep.load.seed + 1 + list(sweep.loads()).index(cell)
    limits = ["--slo-ttft-ms", str(sweep.slo.ttft_ms), "--slo-inter-token-ms", str(sweep.slo.inter_token_ms)]
    peak = Peak(server.process.pid)
    with peak.watching():
        result = load(
            server,
            clients,
            max(2, clients * sweep.load.requests),
            cell["output_tokens"],
            *_prompts(sweep, cell, vocabulary, seed),
            *limits,
        )
        peak.look()
    after = server.metrics()

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    done, seconds = result["requests"], result["seconds"]
    looked_up = grown("vllm:prefix_cache_queries_total")
    return {
        "requests": done,
        "errors": result["errors"],
        "error": result["first_error"],
        "seconds": round_to(seconds),
        "output_tokens_per_second": round_to(result["tokens_per_second"]),
        "total_tokens_per_second": round_to(done * (cell["prompt_tokens"] + cell["output_tokens"]) / seconds),
        "goodput_requests_per_second": round_to(result["good_requests"] / seconds),
        "good_share": round_to(result["good_requests"] / max(1, done + result["errors"])),
        **{
            f"{name}_{share}_ms": round_to(1e3 * result[name].get(share, 0.0))
            for name in ("ttft", "inter_token")
            for share in ("p50", "p95", "p99")
        },
        "kv_block_tokens": int(after.get("cache:block_size", 0)),
        "kv_blocks": int(after.get("cache:num_gpu_blocks", 0)),
        "preemptions": int(grown("vllm:num_preemptions_total")),
        "prefix_hit_share": round_to(grown("vllm:prefix_cache_hits_total") / looked_up) if looked_up else 0.0,
        "peak_gpu_bytes": peak.gpu_bytes,
        "peak_rss_bytes": peak.rss_bytes,
    }


def _prompts(sweep: Sweep, cell: Cell, vocabulary: int, seed: int) -> list[str]:
    options = {
        "prompt-tokens": cell["prompt_tokens"],
        "shared-tokens": min(sweep.load.shared_tokens, cell["prompt_tokens"]),
        "vocabulary": vocabulary,
        "seed": seed,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def predicted_blocks(shape: Shape, engine: Mapping[str, Any], row: Mapping[str, Any]) -> int | None:
    """What `gemma-server plan` says; None where it cannot, as of a share of a CPU's memory."""
    if not row["kv_block_tokens"]:
        return None
    parallel = int(engine.get("tensor_parallel_size", 1))
    value_bytes = _value_bytes(shape, engine)
    if memory := engine.get("kv_cache_memory_bytes"):
        cache = KVCache.of(shape.layers, parallel, value_bytes, row["kv_block_tokens"])
        return cache.blocks(memory)
    memory = next((memory for _, memory, _ in gpus()), None)
    if memory is None:
        return None
    chosen = {name: engine[name] for name in _PLANNED if name in engine}
    options = Options(kv_cache_value_bytes=value_bytes, block_size=row["kv_block_tokens"], **chosen)
    made = plan(shape, GPU(memory, math.nan), parallel, options)
    return made.cache.blocks(max(0, made.cache_memory))


def bandwidth_share(
    shape: Shape, engine: Mapping[str, Any], row: Mapping[str, Any], gb_per_second: float | None
) -> float | None:
    """What one chat's answer reads, by what the memory gives; None with more chats.

    Each step reads the weights, and the keys and values of half an answer on average.
    """
    load, milliseconds = row["load"], row["inter_token_p50_ms"]
    if load["concurrency"] != 1 or not milliseconds or gb_per_second is None:
        return None
    length = load["prompt_tokens"] + load["output_tokens"] // 2
    values = sum(
        2 * layer.kv_heads * layer.head_size * min(length, layer.window or length) for layer in shape.layers
    )
    read = shape.step_parameters * shape.weight_bytes + values * _value_bytes(shape, engine)
    gpus = int(engine.get("tensor_parallel_size", 1))  # each reads its part at the same time
    return round_to(read / (milliseconds / 1e3) / (gb_per_second * 1e9 * gpus))


def _value_bytes(shape: Shape, engine: Mapping[str, Any]) -> int:
    """Of a number in the KV cache."""
    kind = str(engine.get("kv_cache_dtype", "auto"))
    return 1 if kind.startswith("fp8") else 2 if kind.endswith("16") else shape.activation_bytes


def _reason(log: str) -> str:
    """What the log's last error says; whole lines of it would make the report unreadable."""
    if found := re.findall(r"\w*Error: ([^\"\\\n]{10,})", log):
        return str(found[-1])[:300].strip()
    lines = [line for line in log.splitlines() if "Error" in line or "error" in line]
    return (lines or log.splitlines() or ["no log"])[-1].strip()[-300:]


def _words(cell: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in cell.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    end_on_signals("ended; the same command goes on")
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, help="folder, by default benchmarks/out/ and the file's name")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the report again")
    options = parser.parse_args()
    sweep = Sweep.model_validate(yaml.safe_load(options.config.read_text(encoding="utf8")))
    out = (options.out or ROOT / "benchmarks" / "out" / options.config.stem).resolve()
    rows = Rows(out / "rows.jsonl", sweep)
    if not options.report:
        run(sweep, rows, out)
    print(sweep_report.write(rows.head, rows.rows, out))


if __name__ == "__main__":
    main()

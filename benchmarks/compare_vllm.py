"""This server against vLLM's own, in turn (A B A B), on the same model, engine arguments and load.

    python benchmarks/compare_vllm.py                          everything: an hour
    python benchmarks/compare_vllm.py --engines null --clients 64 256 --rounds 5 --together

Ours runs with keys, limits, metrics and the access log on, vLLM's bare. CPU is that of the API process, from
/proc, per token asked for; ratios are ours by theirs, the median of the rounds and their range. A machine
that others use too changes its speed within minutes: with --together both servers stay up, and each load is
put on one and then on the other. Engines:
`demo` is the embedded model. `null` makes random tokens (benchmarks/null_executor.py), at once, so that the
front end is all there is, or with --step-ms at the pace of a model. `raw` is `AsyncLLM.generate` in one
process without a server: the ceiling. `gpu` is the folder of --model, without weights
(benchmarks/synthetic_model.py), on a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import gpus
from benchmarks.plots import draw_comparison
from benchmarks.server import (
    ENVIRON,
    ROOT,
    Server,
    end_on_signals,
    free_port,
    load,
    our_command,
    round_to,
    running,
)

MODEL = ROOT / "gemma_serve" / "demo_model"
NULL = "benchmarks.null_executor.NullExecutor"
CACHE_BYTES = 4 << 30
SERVERS = ("ours", "vllm")


@dataclass
class Row:
    engine: str
    server: str
    mode: str
    clients: int
    round: int
    tokens_per_second: float
    requests_per_second: float
    cpu_us_per_token: float
    rss_mb: float
    growth_mb: float
    """Of the API process, at its largest since it was warm."""
    ttft_p50_ms: float
    ttft_p99_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    errors: int
    start_seconds: float
    """To the server's first answer; 0 where the other one ran beside it."""
    step_ms: float = 0.0
    """Of the engine `null`."""


@contextlib.contextmanager
def serving(server: str, engine: str, stream_interval: int, log: Path) -> Iterator[Server]:
    port, key = free_port(), f"sk-{secrets.token_hex(16)}"
    if engine == "gpu":
        command = _on_gpu(server, stream_interval, log, port, key)
        with running(command, port, key, "gemma-demo", log) as started:
            yield started
        return
    most = 1024 if engine == "null" else 256
    if server == "ours":
        settings: dict[str, dict[str, Any]] = {
            "model": {"name": "gemma-demo"},
            "engine": {
                "max_num_seqs": most,
                "kv_cache_memory_bytes": CACHE_BYTES,
                "stream_interval": stream_interval,
            },
        }
        if engine == "null":
            settings["engine"]["distributed_executor_backend"] = NULL
        command = our_command(settings, port, key, log.with_suffix(".yaml"))
    else:
        command = ["-m", "vllm.entrypoints.launchers.api_server.entry", "--port", str(port)]
        command += ["--host", "127.0.0.1", "--model", str(MODEL), "--served-model-name", "gemma-demo"]
        command += ["--max-num-seqs", str(most), "--kv-cache-memory-bytes", str(CACHE_BYTES)]
        command += ["--stream-interval", str(stream_interval)]
        if not gpus():  # where ours goes without, too
            command.append("--no-enable-chunked-prefill")
        if engine == "null":
            command += ["--distributed-executor-backend", NULL]
    with running(command, port, key, "gemma-demo", log) as started:
        yield started


def _on_gpu(server: str, stream_interval: int, log: Path, port: int, key: str) -> list[str]:
    folder = os.environ["COMPARE_MODEL"]
    if server == "ours":
        settings: dict[str, dict[str, Any]] = {
            "model": {"name": folder, "served_name": "gemma-demo", "max_length": 4096},
            "engine": {
                "load_format": "dummy",
                "max_num_seqs": 1024,
                "gpu_memory_utilization": 0.8,
                "stream_interval": stream_interval,
            },
        }
        return our_command(settings, port, key, log.with_suffix(".yaml"))
    command = ["-m", "vllm.entrypoints.cli.main", "serve", folder, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "gemma-demo", "--load-format", "dummy"]
    command += ["--max-model-len", "4096", "--max-num-seqs", "1024"]
    return [*command, "--gpu-memory-utilization", "0.8", "--stream-interval", str(stream_interval)]


def measured(
    server: Server, engine: str, name: str, clients: int, round: int, options: argparse.Namespace, whole: bool
) -> Row:
    requests = max(2 * clients, options.requests)
    before = server.cpu_seconds()
    result = load(server, clients, requests, options.tokens, *(["--whole"] if whole else []))
    cpu = server.cpu_seconds() - before

    def ms(kind: str, share: str) -> float:
        return round_to(1e3 * result[kind].get(share, 0.0))

    return Row(
        engine,
        name,
        "whole" if whole else "streamed",
        clients,
        round,
        round_to(result["tokens_per_second"]),
        round_to(result["requests"] / result["seconds"]),
        round_to(cpu / max(1, result["tokens"]) * 1e6),
        round_to(server.rss_mb()),
        round_to(server.growth_mb()),
        ms("ttft", "p50"),
        ms("ttft", "p99"),
        ms("inter_token", "p50"),
        ms("inter_token", "p99"),
        result["errors"],
        0.0 if options.together else round_to(server.start_seconds),
        options.step_ms if engine == "null" else 0.0,
    )


@contextlib.contextmanager
def warm(server: str, engine: str, round: int, options: argparse.Namespace, logs: Path) -> Iterator[Server]:
    log = logs / f"{engine}-{server}-{round}.log"
    with serving(server, engine, options.stream_interval, log) as started:
        load(started, 4, 8, 16)
        started.settle()
        started.mark_memory()
        yield started


def in_turn(engine: str, options: argparse.Namespace, logs: Path) -> Iterator[Row]:
    """One server at a time: what a machine is like that has nothing else to do."""
    for round in range(options.rounds):
        for name in SERVERS:
            with warm(name, engine, round, options, logs) as server:
                for mode in options.modes:
                    for clients in options.clients:
                        yield measured(server, engine, name, clients, round, options, mode == "whole")


def together(engine: str, options: argparse.Namespace, logs: Path) -> Iterator[Row]:
    """Both stay up, and each load is put on one and then on the other, within seconds."""
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(warm(name, engine, 0, options, logs)) for name in SERVERS}
        for round in range(options.rounds):
            for mode in options.modes:
                for clients in options.clients:
                    for name in SERVERS if round % 2 == 0 else reversed(SERVERS):
                        yield measured(servers[name], engine, name, clients, round, options, mode == "whole")
                        servers[name].settle()  # or the next would be measured beside it


async def raw(clients: int, requests: int, tokens: int, stream_interval: int, engine: str) -> float:
    """Tokens/s of `AsyncLLM.generate` for the prompts of `load`, whose deltas are read and dropped."""
    from transformers import AutoTokenizer
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.utils.gc_utils import freeze_gc_heap
    from vllm.v1.engine.async_llm import AsyncLLM

    backend = {"distributed_executor_backend": NULL} if engine == "null" else {}
    args = AsyncEngineArgs(
        model=str(MODEL),
        max_num_seqs=1024 if engine == "null" else 256,
        kv_cache_memory_bytes=CACHE_BYTES,
        stream_interval=stream_interval,
        enable_chunked_prefill=None if gpus() else False,
        **backend,
    )
    llm = AsyncLLM.from_engine_args(args)
    given = llm.model_config.get_diff_sampling_param()  # top_k and top_p cost a CPU half its speed
    given |= {"temperature": 1.0, "max_tokens": tokens, "ignore_eos": True}
    params = SamplingParams(**given, output_kind=RequestOutputKind.DELTA)
    template = AutoTokenizer.from_pretrained(MODEL).apply_chat_template
    chats = ([{"role": "user", "content": f"Tell me story {number}"}] for number in range(requests))
    prompts = [template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    left = iter(enumerate(prompts))

    async def answer(number: int, prompt: list[int]) -> None:
        async for _ in llm.generate({"prompt_token_ids": prompt}, params, f"raw-{number}"):
            pass

    async def client() -> None:
        for number, prompt in left:
            await answer(number, prompt)

    try:
        await asyncio.gather(*(answer(-number, prompts[0]) for number in range(1, 9)))
        freeze_gc_heap()  # as both servers do, once they are warm
        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return requests * tokens / (time.perf_counter() - started)
    finally:
        llm.shutdown()


def raw_row(engine: str, clients: int, round: int, options: argparse.Namespace) -> Row:
    requests = max(2 * clients, options.requests)
    numbers = (clients, requests, options.tokens, options.stream_interval)
    command = [sys.executable, __file__, "--raw", engine, *map(str, numbers)]
    environ = os.environ | ENVIRON
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=1800)
    rate = float(result.stdout.strip().splitlines()[-1])
    return Row(engine, "raw", "streamed", clients, round, round_to(rate), *[0] * 10)


def report(row: Row) -> None:
    text = f"{row.engine} {row.server:<4} {row.mode:<8} {row.clients:5} clients: {row.tokens_per_second:8.0f}"
    print(f"{text} tokens/s, {row.cpu_us_per_token:6.1f} µs/token", file=sys.stderr, flush=True)


def save(rows: list[Row], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def table(rows: list[Row]) -> str:
    """Markdown: medians of the rounds."""
    lines = [
        "| Engine | Mode | Clients | CPU µs/token ours | vllm | ratio (range) "
        "| tokens/s ours | vllm | ratio (range) "
        "| TTFT p50/p99 ms ours | vllm | inter-token p50 ms ours | vllm | errors |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for engine, mode, clients in dict.fromkeys((row.engine, row.mode, row.clients) for row in rows):
        of = {
            name: [
                row
                for row in rows
                if (row.engine, row.mode, row.clients, row.server) == (engine, mode, clients, name)
            ]
            for name in (*SERVERS, "raw")
        }
        ours, theirs = of["ours"], of["vllm"]
        if not (ours and theirs):
            continue
        pace = f", {ours[0].step_ms:g} ms a step" if ours[0].step_ms else ""
        cells = [engine + pace, mode, str(clients)]
        for field in ("cpu_us_per_token", "tokens_per_second"):
            cells += [
                f"{middle(ours, field):.4g}",
                f"{middle(theirs, field):.4g}",
                ratio(ours, theirs, field),
            ]
        for pair in (("ttft_p50_ms", "ttft_p99_ms"), ("inter_token_p50_ms",)):
            cells += ["/".join(f"{middle(side, field):.4g}" for field in pair) for side in (ours, theirs)]
        cells.append(str(sum(row.errors for row in (*ours, *theirs))))
        lines.append("| " + " | ".join(cells) + " |")
        if of["raw"]:
            ceiling = middle(of["raw"], "tokens_per_second")
            share = middle(ours, "tokens_per_second") / ceiling
            lines.append(
                f"| {engine} | raw AsyncLLM | {clients} | | | | | {ceiling:.4g} "
                f"| ours by raw {share:.2f} | | | | | |"
            )
    for engine in dict.fromkeys(row.engine for row in rows):
        lines += start_line(rows, engine) + memory_line(rows, engine)
    return "\n".join(lines)


def start_line(rows: list[Row], engine: str) -> list[str]:
    """Where each started alone. Only the first round's start had to read everything from the disk."""
    last = max(row.round for row in rows)
    sides = [
        [row for row in rows if (row.engine, row.server) == (engine, name) and row.start_seconds]
        for name in SERVERS
    ]
    sides = [[row for row in side if row.round or not last] for side in sides]
    if not all(sides):
        return []
    ours, theirs = (f"{middle(side, 'start_seconds'):.1f} s" for side in sides)
    return ["", f"From the start to the first answer, {engine}: ours {ours}, vllm {theirs}."]


def memory_line(rows: list[Row], engine: str) -> list[str]:
    most = max(row.clients for row in rows if row.engine == engine)
    ours, theirs = (
        max((row.growth_mb for row in rows if (row.engine, row.server) == (engine, name)), default=0.0)
        for name in SERVERS
    )
    each = (f"{growth * 1000 / most:.0f} KB" for growth in (ours, theirs))
    return ["", f"Memory for each of {most} clients at the most, {engine}: ours {', vllm '.join(each)}."]


def middle(rows: list[Row], field: str) -> float:
    return float(statistics.median(getattr(row, field) for row in rows))


def ratio(ours: list[Row], theirs: list[Row], field: str) -> str:
    """Each round's by its neighbour's: their median and their range."""
    each = [
        getattr(one, field) / max(1e-9, getattr(other, field))
        for one, other in zip(ours, theirs, strict=False)
    ]
    return f"**{statistics.median(each):.2f}** ({min(each):.2f} to {max(each):.2f})"


def main() -> None:
    if sys.argv[1:2] == ["--raw"]:
        engine, *numbers = sys.argv[2:]
        clients, requests, tokens, stream_interval = map(int, numbers)
        import uvloop

        print(uvloop.run(raw(clients, requests, tokens, stream_interval, engine)))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=["demo", "null"], choices=["demo", "null", "gpu"])
    parser.add_argument("--modes", nargs="+", default=["streamed", "whole"], choices=["streamed", "whole"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--requests", type=int, default=128, help="at least, and two a client")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=2, help="how often each server is measured")
    parser.add_argument(
        "--together",
        action="store_true",
        help="keep both servers up, and change between them within seconds",
    )
    parser.add_argument("--step-ms", type=float, default=0, help="what a step of the engine null takes")
    parser.add_argument("--stream-interval", type=int, default=1, help="vLLM's, for both")
    parser.add_argument("--ceiling", action="store_true", help="measure AsyncLLM alone, too")
    parser.add_argument("--model", type=Path, help="folder of the engine gpu")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--plot", type=Path, help="write an SVG file of the CPU by token")
    options = parser.parse_args()
    if "gpu" in options.engines:
        if not options.model:
            parser.error("--engines gpu needs --model: a folder of benchmarks/synthetic_model.py")
        if options.together:
            parser.error("--together would have two servers on one GPU: leave it out with --engines gpu")
        if options.ceiling:
            parser.error("--ceiling loads the embedded model: leave it out with --engines gpu")
    if "demo" in options.engines and not gpus() and not shutil.which("g++"):
        parser.error("vLLM compiles the model for a CPU: apt-get install -y g++, or --engines null")
    end_on_signals("ended")
    os.environ["NULL_STEP_MS"] = str(options.step_ms)
    if options.model:
        os.environ["COMPARE_MODEL"] = str(options.model)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for engine in options.engines:
            compare = together if options.together else in_turn
            for row in compare(engine, options, Path(name)):
                rows.append(row)
                report(row)
                save(rows, options.json)
            if options.ceiling:
                rows += [
                    raw_row(engine, clients, round, options)
                    for round in range(options.rounds)
                    for clients in options.clients
                ]
    save(rows, options.json)
    if options.plot:
        draw_comparison([asdict(row) for row in rows], options.plot)
    print(table(rows))


if __name__ == "__main__":
    main()

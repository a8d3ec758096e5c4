"""Load-tests an OpenAI-compatible server with GuideLLM and Locust: `make load-test URL=http://host:8000`.

GuideLLM's `sweep` finds what the server can do, `constant` and `poisson` then ask at 70% of that, or at
--rate; Locust's users behave as people, programs and abusers do (locustfile.py). A key is taken from
OPENAI_API_KEY. The exit status is 1 when a threshold is not kept; --out gets report.html with all of it.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import ROOT, machine

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
USERS = ["ShortChat", "LongContext", "StreamingReader", "FAQ", "Abuser"]
SHARE = 0.7

Result = dict[str, Any]


def model_of(url: str, key: str) -> str:
    """The first model that the server lists. Raises `SystemExit` where there is no such server."""
    request = urllib.request.Request(f"{url}/v1/models")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise SystemExit(f"{url}/v1/models does not answer as OpenAI's does: {error}") from error


def has_websocket(url: str, key: str) -> bool:
    """Whether the chat over a WebSocket, which is this project's own, can be had there."""
    import websocket  # which only the tools' environment has

    header = [f"Authorization: Bearer {key}"] if key else []
    try:
        websocket.create_connection(f"ws{url.removeprefix('http')}/ws", header=header, timeout=30).close()
    except (websocket.WebSocketException, OSError):
        return False
    return True


def guidellm(profile: Mapping[str, Any], options: argparse.Namespace, key: str) -> list[Result]:
    """Runs one profile; its figures, one of each strategy. Raises `RuntimeError` when GuideLLM fails."""
    name = str(profile["kind"])
    paths = {kind: options.out / f"guidellm-{name}.{suffix}" for kind, suffix in _OUTPUTS.items()}
    backend = {"kind": "openai_http", "target": options.url, "model": options.model, "http2": False}
    if key:
        backend["api_key"] = key
    spec = {
        "backend": backend,
        "profile": profile,
        "tokenizer": {"kind": "huggingface_auto", "model": options.tokenizer},
        "data": [
            {
                "kind": "synthetic_text",
                "prompt_tokens": options.prompt_tokens,
                "output_tokens": options.output_tokens,
            }
        ],
        "constraints": [{"kind": "max_duration", "seconds": options.seconds}],
        "seed": {"kind": "static", "value": 0},
        "outputs": [{"kind": kind, "path": str(path)} for kind, path in paths.items()],
    }
    # In a file that only its owner can read: everyone may read a command line.
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"metadata": {"name": name}, "spec": spec}, file)
        file.flush()
        command = [str(BIN / "guidellm"), "run", "--config", file.name, "--disable-progress"]
        environ = os.environ | {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
        ended = subprocess.run(command, env=environ, capture_output=True, text=True)
    (options.out / f"guidellm-{name}.log").write_text(ended.stdout + ended.stderr)
    if ended.returncode or not paths["json"].exists():
        raise RuntimeError(f"guidellm {name} failed:\n{(ended.stdout + ended.stderr)[-2000:]}")
    content = json.loads(paths["json"].read_text(encoding="utf8"))
    return [_figures(name, benchmark) for benchmark in content["benchmarks"]]


_OUTPUTS = {"json": "json", "plot": "svg"}


def _figures(profile: str, benchmark: Mapping[str, Any]) -> Result:
    metrics = benchmark["metrics"]

    def of(name: str, share: str) -> float:
        found = metrics[name]["successful"]
        value = found["percentiles"][share] if share.startswith("p") else found[share]
        return float(f"{value or 0.0:.4g}")

    totals = metrics["request_totals"]
    strategy = benchmark["config"]["strategy"]
    rate = strategy.get("rate")
    return {
        "profile": profile,
        "strategy": strategy.get("type_") or strategy.get("kind"),
        "asked_per_second": None if rate is None else float(f"{rate:.4g}"),
        "requests": totals["successful"],
        "errors": totals["errored"],
        "requests_per_second": of("requests_per_second", "mean"),
        "concurrency": of("request_concurrency", "mean"),
        "output_tokens_per_second": of("output_tokens_per_second", "mean"),
        "ttft_p50_ms": of("time_to_first_token_ms", "p50"),
        "ttft_p95_ms": of("time_to_first_token_ms", "p95"),
        "inter_token_p50_ms": of("inter_token_latency_ms", "p50"),
        "inter_token_p95_ms": of("inter_token_latency_ms", "p95"),
    }


def locust(options: argparse.Namespace, key: str) -> int:
    """Runs the users; Locust's exit status, which its thresholds set."""
    users = [*USERS, *(["WebSocketChatter"] if has_websocket(options.url, key) else [])]
    command = [str(BIN / "locust"), "-f", str(HERE / "locustfile.py"), "--headless", "--only-summary"]
    command += ["-H", options.url, "-u", str(options.users), "-r", str(max(1, options.users // 5))]
    command += ["-t", f"{options.seconds}s", "--stop-timeout", "60"]
    command += ["--html", str(options.out / "locust.html"), "--csv", str(options.out / "locust")]
    command += ["--max-failure-share", str(options.max_failure_share)]
    command += ["--ttft-p95-ms", str(options.ttft_p95_ms), *users]
    environ = os.environ | {"OPENAI_API_KEY": key, "LOAD_MODEL": options.model}
    ended = subprocess.run(
        command, env=environ, cwd=options.out, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    (options.out / "locust.txt").write_text(ended.stdout)
    print(ended.stdout)
    return ended.returncode


def faults_of(results: Sequence[Result], options: argparse.Namespace) -> list[str]:
    """Thresholds hold at the constant and the Poisson rate; a sweep goes where they do not, on purpose."""
    faults = []
    for row in results:
        if row["profile"] == "sweep":
            continue
        share = row["errors"] / max(1, row["requests"] + row["errors"])
        if not row["requests"] or share > options.max_failure_share:
            faults.append(f"{row['profile']}: {row['errors']} errors, {row['requests']} answers")
        elif row["ttft_p95_ms"] > options.ttft_p95_ms:
            faults.append(
                f"{row['profile']}: TTFT p95 {row['ttft_p95_ms']:g} ms, above {options.ttft_p95_ms:g} ms"
            )
    return faults


def report(results: Sequence[Result], faults: Sequence[str], options: argparse.Namespace) -> None:
    """report.html: figures, plots and Locust's own page, in one folder without a network."""
    about = {"url": options.url, "model": options.model} | machine()
    sentences = faults or ["every threshold was kept"]
    verdict = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in (results[0] if results else {}))
    rows = "".join(f"<tr>{''.join(map(_cell, row.values()))}</tr>" for row in results)
    plots = "".join(
        f"<h2>{path.stem.removeprefix('guidellm-')}</h2><img alt='{path.stem}' src='{path.name}'>"
        for path in sorted(options.out.glob("guidellm-*.svg"))
    )
    users = (options.out / "locust.txt").read_text() if (options.out / "locust.txt").exists() else ""
    text = " · ".join(f"{name} {value}" for name, value in about.items() if value)
    (options.out / "report.html").write_text(
        f"<!doctype html><meta charset=utf-8><title>Load test</title><style>{_STYLE}</style>"
        f"<h1>Load test of {html.escape(options.url)}</h1><p>{html.escape(text)}</p><ul>{verdict}</ul>"
        f"<table><tr>{head}</tr>{rows}</table>{plots}"
        f"<h2>Users</h2><p><a href=locust.html>Locust's page</a></p><pre>{html.escape(users)}</pre>",
        encoding="utf8",
    )
    summary = {"about": about, "thresholds": list(faults), "results": list(results)}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf8")


def _cell(value: Any) -> str:
    return f"<td>{'-' if value is None else html.escape(str(value))}</td>"


_STYLE = (
    "body{font:15px system-ui;margin:2em;max-width:75em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:right}img{max-width:100%}"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="with or without /v1")
    parser.add_argument("--model", help="by default the first that the server lists")
    parser.add_argument(
        "--tokenizer",
        default=str(ROOT / "gemma_serve" / "demo_model"),
        help="name or folder, to make prompts of a length; by default the embedded model's",
    )
    parser.add_argument("--seconds", type=int, default=30, help="of each strategy, and of Locust")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--sweep-size", type=int, default=5, help="strategies of the sweep")
    parser.add_argument("--rate", type=float, help="requests per second, by default 70%% of the sweep's best")
    parser.add_argument("--users", type=int, default=20, help="of Locust")
    parser.add_argument("--max-failure-share", type=float, default=0.01)
    parser.add_argument("--ttft-p95-ms", type=float, default=5000)
    parser.add_argument("--only", choices=["guidellm", "locust"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "load")
    options = parser.parse_args()
    options.url = options.url.rstrip("/").removesuffix("/v1")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    for tool in ("guidellm-*", "locust*"):
        for old in options.out.glob(tool):
            old.unlink()
    key = os.environ.get("OPENAI_API_KEY", "")
    options.model = options.model or model_of(options.url, key)
    results: list[Result] = []
    faults: list[str] = []
    try:
        if options.only != "locust":
            results += guidellm({"kind": "sweep", "sweep_size": options.sweep_size}, options, key)
            best = max(row["requests_per_second"] for row in results)
            rate = options.rate or max(0.1, SHARE * best)
            for kind in ("constant", "poisson"):
                print(f"{kind}: {rate:.3g} requests/s", file=sys.stderr)
                results += guidellm({"kind": kind, "rate": [rate]}, options, key)
        if options.only != "guidellm" and locust(options, key):
            faults.append("Locust's users: see below")
    except KeyboardInterrupt:
        faults.append("the run was interrupted")
    faults = [*faults_of(results, options), *faults]
    report(results, faults, options)
    for row in results:
        print(json.dumps(row))
    print("\n".join(faults) or "every threshold was kept", f"\n{options.out / 'report.html'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

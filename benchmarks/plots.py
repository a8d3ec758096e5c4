"""The plots; the only module that draws. There are none without matplotlib (the extra `bench`)."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sweep_report import Row, knee, label, pareto, speed_of_one


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Writes SVG files of a sweep into `out`; returns them."""
    if not rows or not _can_draw():
        return []
    drawn = {
        "throughput_by_memory": _by_memory,
        "latency_by_concurrency": _latency,
        "throughput_by_concurrency": _throughput,
        "pareto": _pareto,
    }
    paths = []
    for name, fill in drawn.items():
        paths.append(out / f"{name}.svg")
        _figure(paths[-1], fill, rows)
    return paths


def draw_comparison(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes an SVG file of compare_vllm's measurements."""
    if rows and _can_draw():
        _figure(path, _cost, rows)


def _can_draw() -> bool:
    try:
        import matplotlib
    except ImportError:
        print("no plots: pip install matplotlib (the extra `bench`)", file=sys.stderr)
        return False
    matplotlib.use("svg")
    # The same file for the same rows, so that a commit shows what changed.
    matplotlib.rcParams.update(
        {"svg.hashsalt": "gemma_serve", "svg.fonttype": "none", "font.size": 9, "axes.grid": True}
    )
    return True


def _figure(path: Path, fill: Any, rows: Sequence[Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    fill(axes, rows)
    figure.savefig(path, metadata={"Date": None})


def _settings(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by engine setting and lengths, each in the order of its clients."""
    found: dict[str, list[Row]] = {}
    several = len({(row["load"]["prompt_tokens"], row["load"]["output_tokens"]) for row in rows}) > 1
    for row in sorted(rows, key=lambda row: int(row["load"]["concurrency"])):
        name = label(row["engine"])
        if several:
            name += f", {row['load']['prompt_tokens']}/{row['load']['output_tokens']} tokens"
        found.setdefault(name, []).append(row)
    return found


def _by_memory(axes: Any, rows: Sequence[Row]) -> None:
    """Best throughput of each setting; a line for each set of the other arguments."""
    memory = "kv_cache_memory_bytes"
    if any("gpu_memory_utilization" in row["engine"] for row in rows):
        memory = "gpu_memory_utilization"
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        rest = {name: value for name, value in row["engine"].items() if name != memory}
        amount = float(row["engine"].get(memory, 0)) / (1 << 30 if memory.endswith("bytes") else 1)
        line = lines.setdefault(label(rest) or "all", {})
        line[amount] = max(line.get(amount, 0.0), row["output_tokens_per_second"])
    for name, line in lines.items():
        axes.plot(*zip(*sorted(line.items()), strict=True), marker="o", label=name)
    axes.set(xlabel="KV cache, GiB" if memory.endswith("bytes") else memory, ylabel="best output tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend()


def _latency(axes: Any, rows: Sequence[Row]) -> None:
    for name, line in _settings(rows).items():
        clients = [row["load"]["concurrency"] for row in line]
        axes.plot(clients, [row["ttft_p95_ms"] for row in line], marker="o", label=name)
    axes.set(xlabel="clients", ylabel="time to first token, p95 ms", xscale="log", yscale="log")
    axes.legend()


def _throughput(axes: Any, rows: Sequence[Row]) -> None:
    for name, line in _settings(rows).items():
        clients = [row["load"]["concurrency"] for row in line]
        (drawn,) = axes.plot(clients, [_rate(row) for row in line], marker="o", label=name)
        if (bend := knee(line)) is not None:
            point = (bend["load"]["concurrency"], bend["output_tokens_per_second"])
            axes.plot(*point, marker="s", markersize=11, fillstyle="none", color=drawn.get_color())
            axes.annotate("knee", point, textcoords="offset points", xytext=(8, -12))
    axes.set(xlabel="clients", ylabel="output tokens/s", xscale="log")
    axes.set_ylim(bottom=0)
    axes.legend()


def _pareto(axes: Any, rows: Sequence[Row]) -> None:
    for name, line in _settings(rows).items():
        axes.scatter([speed_of_one(row) for row in line], [_rate(row) for row in line], label=name, s=18)
    front = sorted(pareto(rows), key=speed_of_one)
    axes.plot(
        [speed_of_one(row) for row in front], [_rate(row) for row in front], "k--", label="Pareto front"
    )
    for row in front:
        point = (speed_of_one(row), _rate(row))
        text = str(row["load"]["concurrency"])
        axes.annotate(text, point, textcoords="offset points", xytext=(4, 4))
    axes.set(xlabel="tokens/s that one client sees", ylabel="output tokens/s of all; numbers are clients")
    axes.legend()


def _cost(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """CPU by token: of each server a line for each engine and mode, through the medians of its rounds."""
    lines: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for row in rows:
        if row["server"] != "raw":
            line = lines.setdefault((row["engine"], row["mode"], row["server"]), {})
            line.setdefault(row["clients"], []).append(row["cpu_us_per_token"])
    kinds = list(dict.fromkeys(name[:2] for name in lines))
    for (engine, mode, server), line in lines.items():
        style = "-" if server == "ours" else "--"
        points = [(clients, statistics.median(costs)) for clients, costs in sorted(line.items())]
        color = f"C{kinds.index((engine, mode))}"
        axes.plot(
            *zip(*points, strict=True), style, marker="o", color=color, label=f"{server}, {engine}, {mode}"
        )
    axes.set(xlabel="clients", ylabel="CPU of the API process, µs by token", xscale="log", yscale="log")
    axes.legend()


def _rate(row: Row) -> float:
    return float(row["output_tokens_per_second"])

"""What a sweep found: rows.csv, report.md and the recommendation, from its rows alone."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

ENOUGH = 0.95
"""A setting with this share of the best throughput is as good; what is left of the memory is worth more."""


def measured(rows: Iterable[Row]) -> list[Row]:
    """Without those that failed."""
    return [row for row in rows if row.get("output_tokens_per_second")]


def meets(row: Row, slo: Row) -> bool:
    return (
        not row["errors"]
        and row["ttft_p95_ms"] <= slo["ttft_ms"]
        and row["inter_token_p95_ms"] <= slo["inter_token_ms"]
    )


def label(engine: Row) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in engine.items())


def _short(value: Any) -> str:
    """Bytes as people say them."""
    if isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value >> 20} MiB" if value < 1 << 30 else f"{value / (1 << 30):g} GiB"
    return str(value)


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Those that none beats in both: tokens/s of all clients, and of each."""
    return [row for row in rows if not any(_beats(other, row) for other in rows)]


def speed_of_one(row: Row) -> float:
    """Tokens/s that one client sees once its answer has begun."""
    return 1e3 / float(row["inter_token_p50_ms"]) if row["inter_token_p50_ms"] else 0.0


def _beats(one: Row, other: Row) -> bool:
    mine = (one["output_tokens_per_second"], speed_of_one(one))
    theirs = (other["output_tokens_per_second"], speed_of_one(other))
    return all(a >= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs


def knee(rows: Sequence[Row]) -> Row | None:
    """Of one setting's rows: beyond it, more clients gain little. Farthest above the line from end to end."""
    points = sorted(rows, key=lambda row: float(row["load"]["concurrency"]))
    if len(points) < 3:
        return None
    xs = [float(row["load"]["concurrency"]) for row in points]
    ys = [float(row["output_tokens_per_second"]) for row in points]
    width, height = xs[-1] - xs[0], max(ys) - min(ys)
    if not (width and height):
        return None
    above = [(y - min(ys)) / height - (x - xs[0]) / width for x, y in zip(xs, ys, strict=True)]
    return points[above.index(max(above))]


def recommendation(rows: Sequence[Row], slo: Row) -> str:
    """One sentence: the smallest setting that has nearly the best throughput within the SLO."""
    ok = measured(rows)
    if not ok:
        return "Nothing was measured: no server started, or every request failed."
    limits = f"TTFT p95 <= {slo['ttft_ms']:g} ms and inter-token p95 <= {slo['inter_token_ms']:g} ms"
    best = max(row["output_tokens_per_second"] for row in ok)
    within = [row for row in ok if meets(row, slo)]
    if not within:
        nearest = min(ok, key=lambda row: _excess(row, slo))
        return (
            f"No setting keeps {limits}. The nearest, {label(nearest['engine'])} with "
            f"{nearest['load']['concurrency']} clients, has TTFT p95 {nearest['ttft_p95_ms']:g} ms and "
            f"inter-token p95 {nearest['inter_token_p95_ms']:g} ms."
        )
    top = max(row["output_tokens_per_second"] for row in within)
    enough = [row for row in within if row["output_tokens_per_second"] >= ENOUGH * top]
    chosen = min(enough, key=_cost)
    share = chosen["output_tokens_per_second"] / best
    return (
        f"{label(chosen['engine'])}: {share:.0%} of the best throughput "
        f"({chosen['output_tokens_per_second']:g} of {best:g} tokens/s) at {limits}, "
        f"with {chosen['load']['concurrency']} clients."
    )


def _excess(row: Row, slo: Row) -> float:
    waits = row["ttft_p95_ms"] / slo["ttft_ms"], row["inter_token_p95_ms"] / slo["inter_token_ms"]
    return float(max(waits))


def _cost(row: Row) -> tuple[float, ...]:
    """Memory first, then what else is a number; then the faster."""
    engine = row["engine"]
    names = ("gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens")
    return (*(float(engine.get(name, 0)) for name in names), -row["output_tokens_per_second"])


_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "Setting": lambda row: label(row["engine"]),
    "Clients": lambda row: f"{row['load']['concurrency']}",
    "Prompt/answer": lambda row: f"{row['load']['prompt_tokens']}/{row['load']['output_tokens']}",
    "Output tokens/s": lambda row: f"{row['output_tokens_per_second']:g}",
    "Total tokens/s": lambda row: f"{row['total_tokens_per_second']:g}",
    "TTFT p50/p95/p99 ms": lambda row: _three(row, "ttft"),
    "Inter-token p50/p95/p99 ms": lambda row: _three(row, "inter_token"),
    "Of the memory's speed": lambda row: _share(row),
    "Good requests": lambda row: f"{row['good_share']:.0%}",
    "KV blocks": lambda row: f"{row['kv_blocks']:,}",
    "Predicted": lambda row: _prediction(row),
    "Preemptions": lambda row: f"{row['preemptions']}",
    "Prefix hits": lambda row: f"{row['prefix_hit_share']:.0%}",
    "Peak GPU / RSS GiB": lambda row: _peaks(row),
    "Errors": lambda row: f"{row['errors']}",
}


def _three(row: Row, name: str) -> str:
    return "/".join(f"{row[f'{name}_{share}_ms']:g}" for share in ("p50", "p95", "p99"))


def _share(row: Row) -> str:
    share = row.get("bandwidth_share")
    return "-" if share is None else f"{share:.1%}"


def _prediction(row: Row) -> str:
    predicted = row.get("predicted_kv_blocks")
    if predicted is None:
        return "-"
    off = predicted / row["kv_blocks"] - 1 if row["kv_blocks"] else 0.0
    return f"{predicted:,}" + (f" ({off:+.1%})" if off else " (exact)")


def _peaks(row: Row) -> str:
    gpu = row["peak_gpu_bytes"]
    return f"{'-' if gpu is None else f'{gpu / 2**30:.1f}'} / {row['peak_rss_bytes'] / 2**30:.1f}"


def markdown(head: Row, rows: Sequence[Row], plots: Sequence[Path]) -> str:
    sweep, machine = head["sweep"], head["machine"]
    ok = measured(rows)
    lines = [
        f"# Memory sweep of {sweep['synthetic'] or sweep['model']}",
        "",
        recommendation(rows, sweep["slo"]),
        "",
        " · ".join(f"{name} {value}" for name, value in machine.items() if value),
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
        *("| " + " | ".join(cell(row) for cell in _COLUMNS.values()) + " |" for row in ok),
    ]
    if failed := [row for row in rows if row not in ok]:
        lines += ["", "Not measured:", ""]
        for row in failed:
            load = "" if row["load"] is None else f", {label(row['load'])}"
            reason = str(row.get("error") or "every request failed").replace("\n", " ")
            lines.append(f"- {label(row['engine'])}{load}: {reason}")
    lines += ["", *(f"![{plot.stem.replace('_', ' ')}]({plot.name})" for plot in plots)]
    return "\n".join(lines).rstrip() + "\n"


def write(head: Row, rows: Sequence[Row], out: Path) -> str:
    """Writes the files; returns the report."""
    from benchmarks import plots

    drawn = plots.draw(measured(rows), out)
    text = markdown(head, rows, drawn)
    (out / "report.md").write_text(text, encoding="utf8")
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with (out / "rows.csv").open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)
    return text


def _flat(row: Row) -> dict[str, Any]:
    rest = {name: value for name, value in row.items() if name not in ("engine", "load")}
    return {**row["engine"], **(row["load"] or {}), **rest}

"""`gemma-server plan`: will a model fit on a GPU, for how many users, with which settings?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from .errors import StartupError
from .plan import GIB, GPU, GPUS, Options, Plan, plans

if TYPE_CHECKING:
    from .engine.shape import Shape

_EPILOG = """\
Blocks of the KV cache are computed as vLLM computes them; the reserve is an estimate of what its profile run
finds.

examples:
  gemma-server plan --model google/gemma-3-27b-it --gpu H100
  gemma-server plan --model google/gemma-3-4b-it --gpu L4 --context 8192 --users 32
  gemma-server plan --model ./my-gemma --gpu 48 --kv-cache-dtype fp8        a GPU of 48 GiB
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.set_defaults(run=_plan)
    parser.add_argument("--model", required=True, metavar="NAME", help="a Gemma's name, or its folder")
    parser.add_argument(
        "--gpu", required=True, metavar="NAME", help="H100, L4, A100, …; or its memory in GiB"
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a chat, by default 8192")
    parser.add_argument("--users", type=int, default=16, metavar="N", help="chats at once, by default 16")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="X", help="vLLM's, by default 0.9"
    )
    parser.add_argument(
        "--kv-cache-dtype", default="auto", choices=["auto", "fp8", "bfloat16", "float32"], help="vLLM's"
    )
    parser.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="vLLM's")
    parser.add_argument("--json", action="store_true", help="for programs")


_VALUE_BYTES = {"auto": None, "fp8": 1, "bfloat16": 2, "float32": 4}


def _plan(options: argparse.Namespace) -> int:
    gpu = _gpu(options.gpu)
    for name in ("users", "context", "max_num_batched_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise StartupError(f"--{name.replace('_', '-')} {value}: at least 1")
    if not 0 < options.gpu_memory_utilization <= 1:
        raise StartupError(f"--gpu-memory-utilization {options.gpu_memory_utilization}: above 0, at most 1")
    from .engine.shape import read_shape  # imports torch and transformers: other commands do without

    shape = read_shape(options.model)
    context = options.context or min(8192, shape.max_length)
    if context > shape.max_length:
        raise StartupError(f"--context {context}: {options.model} was made for {shape.max_length} tokens")
    wanted = Options(
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_value_bytes=_VALUE_BYTES[options.kv_cache_dtype],
    )
    # As vLLM's own defaults, which have less for an A100: more makes it slower, vllm-project/vllm#17885.
    large = gpu.memory > 70 << 30 and gpu != GPUS["A100"]
    wanted = replace(
        wanted,
        max_num_batched_tokens=8192 if large else 2048,
        max_num_seqs=max(wanted.max_num_seqs, options.users),
    )
    if options.max_num_batched_tokens is not None:
        wanted = replace(wanted, max_num_batched_tokens=options.max_num_batched_tokens)
    rows = list(plans(shape, gpu, wanted))
    chosen = next((row for row in rows if row.serves(options.users, context, wanted)), None)
    if options.json:
        print(json.dumps(_as_json(shape, rows, chosen, context), indent=1))
    else:
        _print(shape, gpu, rows, chosen, context, wanted, options)
    return 0 if chosen else 1


def _gpu(name: str) -> GPU:
    if (known := GPUS.get(name.upper())) is not None:
        return known
    try:
        memory = float(name)
    except ValueError:
        raise StartupError(f"--gpu {name}: one of {', '.join(GPUS)}, or its memory in GiB") from None
    if not 1 <= memory <= 10_000:
        raise StartupError(f"--gpu {name}: its memory in GiB")
    return GPU(int(memory * GIB), float("nan"))


def _as_json(shape: Shape, rows: Sequence[Plan], chosen: Plan | None, context: int) -> dict[str, Any]:
    plans = [
        asdict(row)
        | {
            "decode_limit": None if row.decode_limit != row.decode_limit else row.decode_limit,
            "kv_blocks": row.cache.blocks(max(0, row.cache_memory)),
            "chats": row.chats(context),
            "kv_bytes_per_token": row.cache.bytes_per_token(),
        }
        for row in rows
    ]
    recommended = None if chosen is None else chosen.gpus
    return {
        "model": shape.name,
        "parameters": shape.parameters,
        "context": context,
        "plans": plans,
        "tensor_parallel_size": recommended,
    }


def _print(
    shape: Shape,
    gpu: GPU,
    rows: Sequence[Plan],
    chosen: Plan | None,
    context: int,
    wanted: Options,
    options: argparse.Namespace,
) -> None:
    print(f"{shape.name}: {shape.parameters / 1e9:.3g} billion parameters of {shape.weight_bytes:.3g} bytes")
    windows = {layer.window for layer in shape.layers} - {None}
    sliding = sum(layer.window is not None for layer in shape.layers)
    if windows:
        seen = "/".join(f"{window:,}" for window in sorted(windows, key=str))
        print(
            f"{len(shape.layers)} layers have a KV cache; {sliding} of them see the last {seen} tokens only"
        )
    print(f"{options.gpu}: {_gib(gpu.memory)}, of which vLLM may use {wanted.gpu_memory_utilization:.0%}\n")
    table: list[tuple[str, list[str]]] = [
        ("GPUs (tensor parallel)", [str(row.gpus) for row in rows]),
        ("weights, each GPU", [_gib(row.weights) for row in rows]),
        ("reserve, each GPU (estimate)", [_gib(row.reserve) for row in rows]),
        ("KV cache, each GPU", [_gib(row.cache_memory) if row.fits else "none left" for row in rows]),
        ("KV blocks", [f"{row.cache.blocks(max(0, row.cache_memory)):,}" for row in rows]),
        ("KV per further token", [f"{row.cache.bytes_per_token() / 1024:.4g} KiB" for row in rows]),
        (f"KV of a chat of {context:,}", [_gib(row.cache.bytes_of(context)) for row in rows]),
        (f"chats of {context:,} at once", [f"{row.chats(context):,}" for row in rows]),
    ]
    if shape.max_length != context:
        longest = [f"{row.chats(shape.max_length):,}" for row in rows]
        table.append((f"chats of {shape.max_length:,} at once", longest))
    if gpu.bandwidth == gpu.bandwidth:
        limits = [f"{row.decode_limit:,.0f}" for row in rows]
        table.append(("tokens/s of one chat, below", limits))
    for name, cells in table:
        print(f"{name:<30}" + "".join(f"{cell:>14}" for cell in cells))
    print()
    if chosen is None:
        print(f"Not on {rows[-1].gpus} of these: {options.users} chats of {context:,} tokens do not fit.")
        return
    seqs = max(1, min(chosen.chats(context), wanted.max_num_seqs))
    words = [f"gemma-server serve --model {options.model} --max-length {context}"]
    settings: dict[str, Any] = {
        "gpu_memory_utilization": wanted.gpu_memory_utilization,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": wanted.max_num_batched_tokens,
    }
    if chosen.gpus > 1:
        settings["tensor_parallel_size"] = chosen.gpus
    if options.kv_cache_dtype != "auto":
        settings["kv_cache_dtype"] = options.kv_cache_dtype
    words += [f"--set engine.{name}={value}" for name, value in settings.items()]
    print(f"For {options.users} chats of {context:,} tokens, {_gpus(chosen.gpus)}:\n")
    print("  " + " \\\n    ".join(words))


def _gpus(number: int) -> str:
    return "1 GPU is enough" if number == 1 else f"{number} GPUs are needed"


def _gib(amount: float) -> str:
    return f"{amount / GIB:,.3g} GiB"

"""`gemma-server plan`: its arithmetic against vLLM's own code and transformers' models.

The real engine's blocks are those of `test_families.py`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import transformers
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from gemma_serve.cli import main
from gemma_serve.engine.published import PUBLISHED, published, text_only
from gemma_serve.engine.shape import Layer, Shape, read_shape
from gemma_serve.plan import GIB, GPU, GPUS, KVCache, Options, divides, plan, plans, weight_bytes

from .conftest import ServerProcess
from .test_cli import run

PARAMETERS = {
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "functiongemma-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
}
"""As their pages at Hugging Face say."""

GEMMA_4 = [Layer(4, 512 if index % 6 == 5 else 256, None if index % 6 == 5 else 512) for index in range(30)]
"""Its full layers have larger heads."""


def layers_of(name: str) -> list[Layer]:
    return GEMMA_4 if name == "gemma-4" else list(read_shape(name).layers)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_has_the_published_parameters(name: str) -> None:
    assert read_shape(f"google/{name}-it").parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_is_what_transformers_config_class_makes_of_it(name: str) -> None:
    given = published(name)
    assert given is not None
    config = transformers.AutoConfig.for_model(**given).get_text_config()
    for field, value in text_only(given).items():
        if field not in ("rope_scaling", "dtype", "architectures"):
            assert getattr(config, field) == value, field
    # What the shapes leave to the class's defaults.
    assert config.tie_word_embeddings
    assert config.bos_token_id == 2


def vllm_config(length: int, in_flight: int) -> Any:
    """As much of vLLM's as its functions look at."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        model_config=SimpleNamespace(max_model_len=length),
        speculative_config=None,
        max_in_flight_tokens=in_flight,
    )


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("name", [*PUBLISHED, "gemma-4"])
def test_blocks_equal_those_of_vllms_own_code(name: str, block_size: int, gpus: int) -> None:
    layers = layers_of(name)
    specs: dict[str, Any] = {}
    for index, layer in enumerate(layers):
        common: dict[str, Any] = {
            "block_size": block_size,
            "num_kv_heads": max(1, layer.kv_heads // gpus),
            "head_size": layer.head_size,
            "dtype": torch.bfloat16,
        }
        if layer.window is None:
            specs[f"layers.{index}"] = FullAttentionSpec(**common)
        else:
            specs[f"layers.{index}"] = SlidingWindowSpec(**common, sliding_window=layer.window)
    length, in_flight, memory = 8192, 2 * 2048, 10 * GIB
    config = vllm_config(length, in_flight)
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    theirs = kv_cache_utils.get_kv_cache_config_from_groups(config, groups, memory)

    ours = KVCache.of(layers, gpus, value_bytes=2, block_size=block_size)
    assert len(ours.groups) == len(groups)
    assert ours.blocks(memory) == theirs.num_blocks
    concurrency = kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, theirs)
    assert ours.concurrency(memory, length, in_flight) == pytest.approx(concurrency)


def test_a_window_bounds_what_a_long_chat_takes() -> None:
    cache = KVCache.of([Layer(1, 64, 512)] * 5 + [Layer(1, 64)], 1, value_bytes=2, block_size=16)
    assert len(cache.groups) == 6
    growth = cache.blocks_of(100_000) - cache.blocks_of(10_000)
    assert growth == math.ceil(100_000 / 16) - math.ceil(10_000 / 16)  # of the one full layer's group
    whole = KVCache.of([Layer(1, 64)] * 6, 1, value_bytes=2, block_size=16)
    assert cache.bytes_of(100_000) < 0.18 * whole.bytes_of(100_000)
    assert cache.bytes_per_token() == whole.bytes_per_token() / 6


@pytest.mark.parametrize("name", PUBLISHED)
def test_more_gpus_hold_more(name: str) -> None:
    shape = read_shape(name)
    assert weight_bytes(shape, 1) == 2 * shape.parameters
    rows = list(plans(shape, GPUS["H100"], Options()))
    assert rows[0].gpus == 1
    for fewer, more in itertools.pairwise(rows):
        assert more.weights < fewer.weights
        assert more.weights * more.gpus >= 2 * shape.parameters
        if shape.kv_heads >= more.gpus:  # or each GPU has a copy of the head
            assert more.chats(4096) >= fewer.chats(4096)
    assert all(shape.heads % row.gpus == 0 for row in rows)
    assert not divides(shape, 3)


def test_fewer_bytes_in_the_cache_are_more_chats() -> None:
    shape = read_shape("gemma-3-12b")
    whole = plan(shape, GPUS["H100"], 1, Options())
    half = plan(shape, GPUS["H100"], 1, Options(kv_cache_value_bytes=1))
    assert half.chats(8192) in range(2 * whole.chats(8192) - 1, 2 * whole.chats(8192) + 3)
    assert plan(shape, GPU(16 * GIB, 1e12), 1, Options()).chats(1) == 0


def check_blocks(server: ServerProcess, shape: Shape, memory: int, length: int) -> None:
    """What vLLM's metric says of a real start, on the CPU, whose blocks have 128 tokens.

    `memory` are the cache's bytes, `length` is that of the context, of which one step takes a whole one.
    """
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
    (line,) = [line for line in metrics.splitlines() if line.startswith("vllm:cache_config_info{")]
    labels = dict(item.split("=", 1) for item in line[line.index("{") + 1 : line.rindex("}")].split('",'))
    blocks, tokens = (int(labels[name].strip('"')) for name in ("num_gpu_blocks", "kv_cache_size_tokens"))
    cache = KVCache.of(shape.layers, 1, shape.activation_bytes, block_size=128)
    assert cache.blocks(memory) == blocks
    assert int(cache.concurrency(memory, length, in_flight=length) * length) == tokens


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """`gemma-server plan` in this process, which has torch and transformers: code, output, errors."""
    code = main(["plan", *arguments])
    return code, *capsys.readouterr()


def test_the_command_recommends_what_it_computed(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("plan", "--model", "google/gemma-3-27b-it", "--gpu", "H100", "--users", "60")
    assert result.returncode == 0, result.stderr
    assert "27.4 billion parameters" in result.stdout
    assert "2 GPUs are needed" in result.stdout
    assert "--set engine.tensor_parallel_size=2" in result.stdout
    _, report, _ = command(capsys, "--model", "gemma-3-27b", "--gpu", "H100", "--users", "60", "--json")
    content = json.loads(report)
    assert content["tensor_parallel_size"] == 2
    assert [row["chats"] >= 60 for row in content["plans"]] == [False, True, True, True]


def test_as_many_chats_at_once_as_users(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "gemma-3-1b", "--gpu", "A100", "--context", "1024", "--users", "500"]
    code, output, _ = command(capsys, *arguments)
    assert code == 0
    assert "engine.max_num_seqs=500" in output
    assert "engine.max_num_batched_tokens=2048" in output


def test_a_step_reads_what_its_token_needs(tmp_path: Path) -> None:
    text = read_shape("gemma-3-1b")
    assert text.step_parameters == text.parameters
    images = read_shape("gemma-3-4b")
    assert images.parameters - images.step_parameters == pytest.approx(420e6, rel=0.01)

    config = transformers.Gemma4TextConfig(
        num_hidden_layers=2,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=64,
        architectures=["Gemma4ForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    mixed = read_shape(str(tmp_path))
    expert = 3 * 64 * config.hidden_size
    embeddings = config.vocab_size_per_layer_input * 2 * config.hidden_size_per_layer_input
    assert mixed.parameters - mixed.step_parameters == 2 * 6 * expert + embeddings
    made = plan(mixed, GPUS["H100"], 1, Options())
    assert made.decode_limit == pytest.approx(GPUS["H100"].bandwidth / (2 * mixed.step_parameters))


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_missing_package_ends_with_a_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    transformers.Gemma3nConfig(architectures=["Gemma3nForConditionalGeneration"]).save_pretrained(tmp_path)
    code, _, errors = command(capsys, "--model", str(tmp_path), "--gpu", "L4")
    assert code == 1
    assert "pip install timm" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "gemma-3-1b", "--gpu", "H1000"], "one of A10G"),
        (["--model", "/no/such-model", "--gpu", "L4"], "/no/such-model"),
        (["--model", "gemma-3-1b", "--gpu", "L4", "--context", "99999"], "was made for 32768 tokens"),
        (["--model", "gemma-3-1b", "--gpu", "L4", "--users", "0"], "at least 1"),
    ],
)
def test_a_mistake_ends_with_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    code, _, errors = command(capsys, *arguments)
    assert code == 1
    assert errors.startswith("gemma-server: ") and sentence in errors


def test_another_kind_of_model_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    transformers.GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    code, _, errors = command(capsys, "--model", str(tmp_path), "--gpu", "L4")
    assert code == 1
    assert "another shape than a Gemma" in errors and "Traceback" not in errors


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = command(capsys, "--model", "gemma-3-27b", "--gpu", "8", "--users", "100")
    assert code == 1
    assert "none left" in output
    assert "do not fit" in output
